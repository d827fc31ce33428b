"""`fastserve embed`: a file's lines become a NumPy file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from fastserve import Encoder, cli
from fastserve.commands import embed

from ..encoder_checkpoints import save_encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_encoder(directory, "bert")
    return directory


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Four texts, one of them empty."""
    path = tmp_path / "lines.txt"
    path.write_text("w1 w2\n\nw3\nw4 w5 w6\n")
    return path


def test_each_line_has_a_row(
    model: Path, lines: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embed, "CHUNK", 3)
    assert cli.main(["embed", "--model", str(model), str(lines)]) == 0
    found = np.load(lines.with_suffix(".npy"))
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found, Encoder.load(model).embed(["w1 w2", "", "w3", "w4 w5 w6"]), atol=1e-6, rtol=1e-5
    )
    printed = capsys.readouterr()
    assert printed.out.endswith("lines.npy: 4 embeddings of 32 dimensions\n")
    assert "4 texts" in printed.err


def test_standard_input_and_options(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w1 " * 600)))
    out = tmp_path / "out.npy"
    options = ["--out", str(out), "--dimensions", "5", "--truncate", "--dtype", "bfloat16"]
    assert cli.main(["embed", "--model", str(model), *options, "-"]) == 0
    assert np.load(out).shape == (1, 5)


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (b"", [], "got no line; allowed: a text a line"),
        (b"\xff", [], "allowed: UTF-8"),
        (b"w1\nw2\n" + b"w3 " * 600, [], "lines 1 to 3: `texts[2]`: got 602 tokens; allowed: 1 to 512"),
        (b"w1", ["--dimensions", "33"], "`dimensions`: got 33; allowed: an integer from 1 to 32"),
        (b"w1", ["--prompt-name", "query"], "`prompt_name`: got 'query'; allowed: none"),
        (b"w1", ["--device", "tpu"], "device: got 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
    ],
)
def test_what_cannot_be_embedded_is_one_line_and_leaves_no_file(
    content: bytes,
    options: list[str],
    sentence: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(content)
    assert cli.main(["embed", "--model", str(model), *options, str(path)]) == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [path]


def test_standard_input_wants_a_file_to_write_to(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["embed", "--model", str(model), "-"]) == 1
    assert "--out: got none; allowed with standard input: a file" in capsys.readouterr().err
