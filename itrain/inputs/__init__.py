"""What a base model is given, which of its tokens a position names, and what tells examples apart."""

from itrain.inputs.batch import ModelInputs as ModelInputs
from itrain.inputs.batch import needs_no_wait as needs_no_wait
from itrain.inputs.compared_texts import ComparedTexts as ComparedTexts
from itrain.inputs.positions import Acts as Acts
from itrain.inputs.positions import PositionError as PositionError
from itrain.inputs.positions import TokenIndices as TokenIndices
from itrain.inputs.texts_and_images import TextsAndImages as TextsAndImages
from itrain.inputs.two_texts import TwoTexts as TwoTexts
from itrain.inputs.two_texts import with_decoder as with_decoder
