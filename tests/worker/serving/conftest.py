from __future__ import annotations

import pytest
import tiny_models

from tributary_api.shared import TaskKind
from tributary_worker.compression.loading import load_model


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """A model that never ends by itself and reads long prompts."""
    model = tiny_models.llama(max_position_embeddings=4096)
    loaded = load_model(tiny_models.save(model, tmp_path_factory.mktemp("talker")), TaskKind.CAUSAL_LM)
    loaded.model.generation_config.eos_token_id = []
    return loaded
