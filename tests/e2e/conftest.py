from __future__ import annotations

import pytest
import story as world


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> world.Story:
    return world.build(tmp_path_factory.mktemp("model"))
