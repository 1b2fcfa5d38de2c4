"""What tests share: a tiny model, and the bundled one, fetched and converted once a machine."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the Hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes of two threads each fight for cores


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, to be read and never written."""
    from tiny import write_model

    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def smol_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory."""
    from tutelage.models import catalog

    return catalog.pull("smollm2-135m-instruct")
