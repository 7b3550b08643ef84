"""`bimo.load` on what is no decoder: encoder-decoders and LSTMs answer, in the command line and over HTTP too; an
encoder is refused, and so are settings that have no meaning for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import nn

import bimo
from bimo.backends.build import AnswerRules, choose_precision, read_rules, read_writer_config
from bimo.backends.local import LocalBackend
from bimo.cli.main import main
from bimo.errors import CorruptModelError, UnsupportedModelError, UsageError
from bimo.formats.huggingface import save_directory
from bimo.models.config import EncoderConfig, LSTMConfig, Seq2SeqConfig
from bimo.models.encoder import Encoder
from bimo.models.recurrent import LSTMLanguageModel
from bimo.models.seq2seq import EncoderDecoder
from bimo.serving.app import create_app

from ..conftest import write_tiny_tokenizer

END = 2  # the tiny tokenizer's <|im_end|>


def save(directory: Path, config: Any, model: nn.Module) -> Path:
    source = directory.parent / "tokenizer"
    if not source.exists():
        write_tiny_tokenizer(source)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    save_directory(directory, config, model.named_parameters(), source=source)
    (directory / "chat_template.jinja").unlink()
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": None}))
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories "marian", "lstm" and "bert", random, with the tiny tokenizer."""
    root = tmp_path_factory.mktemp("kinds")
    vocab_size = write_tiny_tokenizer(root / "tokenizer")
    seq2seq = Seq2SeqConfig(
        vocab_size=vocab_size, hidden_size=32, num_encoder_layers=1, num_decoder_layers=2, num_heads=2, head_dim=16,
        intermediate_size=48, max_positions=64, decoder_start_token_id=0, pad_token_id=0, eos_token_id=END,
    )  # fmt: skip
    lstm = LSTMConfig(vocab_size=vocab_size, hidden_size=32, num_layers=1, max_positions=64)
    bert = EncoderConfig(vocab_size=vocab_size, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48)
    save(root / "marian", seq2seq, EncoderDecoder(seq2seq))
    save(root / "lstm", lstm, LSTMLanguageModel(lstm))
    save(root / "bert", bert, Encoder(bert))
    return root


def greedy(directory: Path, ids: list[int], count: int) -> list[int]:
    """By the modules alone."""
    from bimo.formats.huggingface import load_model

    model = load_model(directory, torch.float32)
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < count and answer[-1:] != [END]:
            if isinstance(model, EncoderDecoder):
                scores = model.logits(model(torch.tensor([ids]), torch.tensor([[0, *answer]])))[0, -1]
                scores[0] = -torch.inf  # the start token is never written
            else:
                scores = model.logits(model(torch.tensor([ids + answer])))[0, -1]
            answer.append(int(scores.argmax()))
    return answer


@pytest.mark.parametrize("text", ["The quick brown fox", "床前明月光，", "🦊"])
def test_an_encoder_decoder_answers_its_source(folder: Path, text: str) -> None:
    """Greedily unless asked otherwise; the source ends with the end token, as in training."""
    with bimo.load(str(folder / "marian"), dtype="float32") as model:
        ids = model.tokenizer.encode(text)
        assert ids[-1] == END and ids.count(END) == 1
        answer = model.generate(text, max_tokens=8)
        assert answer.tokens == greedy(folder / "marian", ids, 8)
        assert answer.usage.prompt_tokens == len(ids)
        assert "".join(model.stream(text, max_tokens=8)) == answer.text
        assert len(model.generate(text, max_tokens=8, num_beams=3, n=3)) == 3
        drawn = [model.generate(text, max_tokens=8, seed=seed).tokens for seed in (1, 1, 2, 3)]
        assert drawn[0] == drawn[1] and len(set(map(tuple, drawn))) > 1
        with pytest.raises(UsageError, match=r"encoder-decoder \(marian\), which answers one text"):
            model.chat("hello")
        info = model.backend.info()
        assert (info.reads_source, info.architecture, info.quant, info.context_length) == (True, "marian", "none", 64)


@pytest.mark.parametrize("text", ["The quick brown fox", "床前明月光，", "🦊"])
def test_an_lstm_goes_on(folder: Path, text: str) -> None:
    with bimo.load(str(folder / "lstm")) as model:
        ids = model.tokenizer.encode(text)
        assert model.generate(text, max_tokens=8, temperature=0).tokens == greedy(folder / "lstm", ids, 8)
        info = model.backend.info()
        assert (info.reads_source, info.architecture, info.dtype) == (False, "lstm", "float32")


def test_an_encoder_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="reads text and does not write it"):
        bimo.load(str(folder / "bert"))


@pytest.mark.parametrize("kind", ["marian", "lstm"])
@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"quant": "int8"}, "quant 'int8' is for decoders"),
        ({"quant": "five"}, "quant must be one of"),
        ({"kv_cache_dtype": "int8"}, "is for quantised decoders"),
        ({"draft_model": "smollm2"}, "leave draft_model out"),
        ({"dtype": "float8"}, "dtype must be one of"),
    ],
)
def test_wishes_without_a_meaning_are_refused(folder: Path, kind: str, wishes: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        LocalBackend.load(str(folder / kind), **wishes)  # type: ignore[arg-type]


def test_bfloat16_is_served_when_asked_for(folder: Path) -> None:
    for kind in ("marian", "lstm"):
        assert choose_precision(read_writer_config(kind, folder / kind), dtype="bfloat16").name == "bfloat16"
        with bimo.load(str(folder / kind), dtype="bfloat16") as model:
            assert len(model.generate("Once", max_tokens=5, temperature=0, ignore_eos=True).tokens) == 5


def test_rules_of_generation_config(folder: Path, tmp_path: Path) -> None:
    config = read_writer_config("marian", folder / "marian")
    assert read_rules(folder / "marian", config) == AnswerRules(None, (0,))
    assert read_rules(folder / "lstm", read_writer_config("lstm", folder / "lstm")) == AnswerRules()
    for settings, expected in (
        ({"forced_bos_token_id": 7, "bad_words_ids": [[9], [3, 4]]}, AnswerRules(7, (0, 9))),
        ({"forced_bos_token_id": 0}, AnswerRules(0, ())),
        ({"bad_words_ids": None, "forced_bos_token_id": None}, AnswerRules(None, (0,))),
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        assert read_rules(tmp_path, config) == expected
    for settings in ({"forced_bos_token_id": 10**6}, {"forced_bos_token_id": "x"}, {"bad_words_ids": [[-1]]}):
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        with pytest.raises(CorruptModelError, match="forces or forbids the token"):
            read_rules(tmp_path, config)


def test_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("marian", "lstm"):
        with bimo.load(str(folder / kind)) as model:
            expected = model.generate("从前", max_tokens=6, temperature=0)
        options = ["--prompt", "从前", "--max-tokens", "6", *(["--temperature", "0"] if kind == "lstm" else [])]
        assert main(["generate", str(folder / kind), *options, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == expected.tokens
    assert main(["generate", str(folder / "bert"), "--prompt", "x"]) != 0
    assert "does not write it" in capsys.readouterr().err
    assert main(["chat", str(folder / "marian")]) == 2
    assert "bimo generate" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["marian", "lstm"])
async def test_the_server(folder: Path, kind: str) -> None:
    with LocalBackend.load(str(folder / kind), dtype="float32") as backend:
        transport = httpx.ASGITransport(create_app(backend))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"model": kind, "prompt": ["The sea", "床前"], "max_tokens": 5, "temperature": 0}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["choices"]) == 2
            long = await client.post("/v1/completions", json={**body, "prompt": "海" * 200})
            assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
            messages = [{"role": "user", "content": "hello"}]
            chat = await client.post(
                "/v1/chat/completions", json={"model": kind, "messages": messages, "max_tokens": 4}
            )
            assert chat.status_code == (400 if kind == "marian" else 200)  # without a template: plain lines
            assert kind == "lstm" or "POST /v1/completions" in chat.json()["error"]["message"]
