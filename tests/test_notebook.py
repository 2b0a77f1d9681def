"""What docs/howto/notebook.md says of how things print, which its own blocks do not show."""

from __future__ import annotations

from typing import Any

from tests.pages import run


def test_trainings_of_the_model_itself_print_a_line_for_each_part():
    import itrain

    network = itrain.make_network(itrain.load_embedded().model, trainable=True)
    lora = itrain.LoRAFinetuning(network=network, rank=2, targets=["dense"])
    first, *parts = repr(lora).splitlines()
    assert first == "LoRAFinetuning" and len(parts) == 6 and all("LoRA, 320 parameters" in part for part in parts)


def test_every_edit_prints_in_jupyter():
    space: dict[str, Any] = {}
    run("import itrain\nmodel = itrain.load_embedded()", space)
    html = run("print(model.run('Mary walked because', 'layer2.block_output@1', itrain.Zero)._repr_html_())", space)
    assert "<table>" in html and "Mary walked because" in html and "Zero" in html
    texts = run("print(model.read('Mary walked because', 'layer2.block_output@\"Mary\"')._repr_html_())", space)
    assert "layer2.block_output@&quot;Mary&quot;" in texts
