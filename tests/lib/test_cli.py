"""The `tributary` command against a real S3 server, as a person uses it."""

import os
import subprocess
import sys

import pytest
import yaml

from tributary_api.round import FederatedRoundSpec
from tributary_store.tensors import encode_header

DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(encode_header({"w": ("U8", (3,))}, {}) + b"abc")
    return directory


@pytest.fixture
def tributary(s3):
    def run(*words, **environment):
        keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
        env = {**os.environ, "AWS_ENDPOINT_URL": s3.endpoint_for_host, **keys, **environment}
        argv = [sys.executable, "-m", "tributary_cli.main", *map(str, words)]
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.mark.cluster
def test_a_model_goes_in_and_comes_back(tributary, model, tmp_path):
    pushed = tributary("model", "push", model, "s3://plain/models/")
    assert pushed.returncode == 0, pushed.stderr
    ref = yaml.safe_load(pushed.stdout)
    assert ref["uri"] == "s3://plain/models/" + ref["digest"].removeprefix("sha256:")
    pulled = tributary("model", "pull", ref["uri"], tmp_path / "back")
    assert yaml.safe_load(pulled.stdout) == ref
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == {
        p.name: p.read_bytes() for p in model.iterdir()
    }
    # What was printed is what a round's spec takes.
    spec = {
        "baseModel": ref,
        "clients": {},
        "method": {"full": {}},
        "training": {"maxSteps": 1, "expectedBatchSize": 1, "learningRate": "1"},
        "privacy": {"epsilon": "1", "delta": "1e-6"},
    }
    assert FederatedRoundSpec.model_validate(spec).base_model.digest == ref["digest"]


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("words", "environment", "code", "message"),
    [
        (["push", "{model}/..", "s3://plain/m/"], {}, 3, "has no config.json"),
        (["push", "{model}", "plain/models"], {}, 1, "write s3://bucket/key"),
        (["push", "{model}", "s3://nowhere/m/"], {}, 4, "there is no such bucket"),
        (
            ["push", "{model}", "s3://plain/m/"],
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            5,
            "refuses the credentials",
        ),
        (
            ["push", "{model}", "s3://plain/m/"],
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            6,
            "no answer from",
        ),
        (
            ["push", "hf:no/such", "s3://plain/m/"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            7,
            "push a directory",
        ),
        (["pull", "s3://plain/models/x", "{model}"], {}, 1, "give --digest"),
        (["pull", "s3://plain/models/x", "{model}", "--digest", "1234"], {}, 1, "is not a digest"),
        (["pull", "s3://plain/models/x", "{model}", "--digest", DIGEST], {}, 4, "tributary model push"),
        (["pull"], {}, 2, "usage: tributary model pull"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(tributary, model, *, words, environment, code, message):
    done = tributary("model", *[word.format(model=model) for word in words], **environment)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
