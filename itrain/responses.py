"""The path by which configurations of before name ResponseDataModule; it lives in :mod:`itrain.data.responses`."""

from itrain.data.responses import ResponseDataModule as ResponseDataModule
