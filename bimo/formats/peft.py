"""Adapters in files, as PEFT writes and reads them: what a base is to become, without the base.

    adapter_config.json           kind, base, sizes           bimo.json      lineage; the base as bimo names it, labels
    adapter_model.safetensors     the trained weights         tokenizer.json and what else a model needs to speak

    write_adapter(folder, config, recipe, tensors, base="smollm2", source=base_directory, lineage={})
    file = read_adapter(folder)                               # file.base, file.labels
    recipe, tensors = file.read(config)

`tensors` are by part of bimo's matrices ("layers.0.attention.qkv_proj.q.lora_A", adapters.base); PEFT names the modules
of transformers' models ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"), which the key maps of
`formats.maps` know. What changes the computation and is not known here is refused by name. PEFT has no bottleneck
adapters: theirs have the same two files, and bimo's names.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimo.errors import CorruptModelError, UnsupportedModelError
from bimo.formats.fields import Fields
from bimo.formats.huggingface import COMPANIONS, read_json, staged_directory
from bimo.formats.peft_names import Place, head_names, key_map, matches, places, shortest_ends, targets_of
from bimo.models.config import DecoderConfig, EncoderConfig, ModelConfig, Seq2SeqConfig, TransformerConfig
from bimo.recipe import AdapterRecipe

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdapterFile", "is_adapter", "read_adapter", "write_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {"LORA": "lora", "ADALORA": "adalora", "PREFIX_TUNING": "prefix", "BIMO_BOTTLENECK": "bottleneck"}
PREFIX_TENSOR = "prompt_embeddings"
# Settings that say how it was trained, or that something was left at what bimo takes for granted.
HARMLESS = frozenset((
    "auto_mapping", "base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type", "inference_mode",
    "runtime_config", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "fan_in_fan_out", "modules_to_save", "init_lora_weights", "bias",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
    "ephemeral_gpu_offload", "ensure_weight_tying", "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1",
    "beta2", "orth_reg_weight", "total_step", "num_virtual_tokens", "token_dim", "num_transformer_submodules",
    "num_attention_heads", "num_layers", "encoder_hidden_size", "prefix_projection", "init_weights", "width",
    "base_family",
))  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights as well


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    return (folder / CONFIG).is_file()


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's directory. base: what its base is called, as any command takes it; base_mark: its weights_mark, ""
    of an adapter that bimo has not trained. labels: of a classifier. settings: adapter_config.json."""

    folder: Path
    kind: str
    base: str
    labels: tuple[str, ...]
    settings: Fields
    base_mark: str = ""

    @property
    def num_places(self) -> int:
        """Positions before every text that it takes."""
        return self.settings.integer("num_virtual_tokens", high=1_000_000) if self.kind == "prefix" else 0

    def read(self, config: ModelConfig) -> tuple[AdapterRecipe, dict[str, Tensor]]:
        """What it is, and its tensors in float32, for a base of `config`.

        Raises CorruptModelError (another base; a file that is cut off, a weight that is not a number) and
        UnsupportedModelError, each naming the file.
        """
        if not isinstance(config, DecoderConfig | EncoderConfig | Seq2SeqConfig):
            raise UnsupportedModelError(f"{self.folder} is an adapter, which are for Transformers, not an LSTM")
        held = _read_tensors(self.folder / WEIGHTS)
        reader = {"lora": self._read_lora, "adalora": self._read_adalora, "prefix": self._read_prefix}
        if self.kind in reader:
            recipe, tensors = reader[self.kind](config, held)
        else:
            recipe, tensors = AdapterRecipe(kind="bottleneck", width=self.settings.integer("width")), held
            if (family := self.settings.text("base_family")) != config.family:
                raise CorruptModelError(
                    f"{self.folder} is an adapter for {self.base or 'another base'}, a {family}, and this model is a "
                    f"{config.family}: give it the base it was trained with"
                )
        return recipe, tensors

    # --- low rank ----------------------------------------------------------------------------------------------------

    def _read_lora(self, config: TransformerConfig, held: dict[str, Tensor]) -> tuple[AdapterRecipe, dict[str, Tensor]]:
        fields = self.settings
        dora, rslora = fields.flag("use_dora", False), fields.flag("use_rslora", False)
        rank, alpha = fields.integer("r", 8, high=65_536), fields.number("lora_alpha", 8)
        alphas = fields.section("alpha_pattern")
        tensors: dict[str, Tensor] = {}
        leaves = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
        if dora:
            leaves["magnitude"] = "lora_magnitude_vector"
        for module in self._modules(config, held, leaves):
            own = {leaf: module.tensors[leaf] for leaf in leaves}
            each = len(own["lora_A"])
            wish = next((alphas.number(key) for key in alphas.raw if matches(key, module.name)), alpha)
            scale = wish / (math.sqrt(each) if rslora else each)
            tensors |= module.named(**own, scale=_scalar(scale))
        recipe = AdapterRecipe(
            kind="lora",
            rank=rank,
            alpha=alpha,
            dropout=self._dropout(),
            rslora=rslora,
            dora=dora,
            targets=targets_of(tensors),
        )
        return recipe, {**tensors, **self._heads(config, held)}

    def _read_adalora(
        self, config: TransformerConfig, held: dict[str, Tensor]
    ) -> tuple[AdapterRecipe, dict[str, Tensor]]:
        import torch

        fields = self.settings
        initial, rank = fields.integer("init_r", 12, high=65_536), fields.integer("target_r", 8, high=65_536)
        alpha = fields.number("lora_alpha", 8)
        patterns = fields.section("rank_pattern").raw
        tensors: dict[str, Tensor] = {}
        leaves = {leaf: leaf for leaf in ("lora_A", "lora_B", "lora_E")}
        for module in self._modules(config, held, leaves):
            own = {leaf: module.tensors[leaf] for leaf in leaves}
            mask: Any = next(
                (mask for key, mask in patterns.items() if key.partition(".lora_E")[0] == module.name), [True] * initial
            )
            if not isinstance(mask, list) or not all(isinstance(flag, bool) for flag in mask):
                raise CorruptModelError(f"{fields.where}: rank_pattern of {module.name} should be a list of booleans")
            kept = torch.tensor(mask, dtype=torch.bool)
            if len(kept) != initial or int(kept.sum()) != len(own["lora_A"]):
                raise CorruptModelError(
                    f"{self.folder / WEIGHTS} has {len(own['lora_A'])} ranks of {module.name}, {CONFIG} says "
                    f"{int(kept.sum())} of {initial}: the two files do not belong together"
                )
            tensors |= module.named(**own, kept=kept, scale=_scalar(alpha / (initial + 1e-5)))
        recipe = AdapterRecipe(
            kind="adalora",
            rank=min(rank, initial),
            initial_rank=initial,
            alpha=alpha,
            dropout=self._dropout(),
            targets=targets_of(tensors),
        )
        return recipe, {**tensors, **self._heads(config, held)}

    def _dropout(self) -> float:
        return self.settings.share("lora_dropout") if self.settings.has("lora_dropout") else 0.0

    def _modules(self, config: TransformerConfig, held: dict[str, Tensor], leaves: Mapping[str, str]) -> list[_Module]:
        """The modules that the file changes; what belongs to them is taken out of `held`. The same ones in all layers,
        and of this model."""
        keys = key_map(config)
        found: list[_Module] = []
        whole: dict[str, set[str]] = {}  # kind of part -> the modules that have it
        for place in places(config):
            whole.setdefault(place.kind, set()).add(place.module)
            for spelling in keys.spellings(place.module):
                names = {leaf: f"base_model.model.{spelling}.{suffix}" for leaf, suffix in leaves.items()}
                if any(name in held for name in names.values()):
                    found.append(self._module(place, spelling, names, held))
        other = [name for name in held if ".lora_" in name]
        if not found or other:
            what = f"changes {other[0]}" if other else "changes none of its matrices"
            raise CorruptModelError(
                f"{self.folder} is an adapter for {self.base or 'another base'} and {what}, which this {config.family} "
                f"model does not have: give it the base it was trained with"
            )
        there = {module.place.module for module in found}
        for kind in {module.place.kind for module in found}:
            if missing := sorted(whole[kind] - there):
                raise UnsupportedModelError(
                    f"{self.folder} changes {kind} in some layers and not in {missing[0]}: bimo has adapters of all "
                    f"layers, or the base is another one than {self.base or 'its own'}"
                )
        return found

    def _module(self, place: Place, spelling: str, names: Mapping[str, str], held: dict[str, Tensor]) -> _Module:
        if missing := [name for name in names.values() if name not in held]:
            raise CorruptModelError(f"{self.folder / WEIGHTS} lacks {missing[0]}: it is incomplete, fetch it again")
        tensors = {leaf: held.pop(name) for leaf, name in names.items()}
        a, b = tensors["lora_A"], tensors["lora_B"]
        rank = a.shape[0] if a.ndim else 0
        wanted = {"lora_A": (rank, place.columns), "lora_B": (place.part.num_rows, rank), "lora_E": (rank, 1),
                  "magnitude": (place.part.num_rows,)}  # fmt: skip
        for leaf, tensor in tensors.items():
            if tuple(tensor.shape) != wanted[leaf]:
                raise CorruptModelError(
                    f"{self.folder} is an adapter for {self.base or 'another base'}: {names[leaf]} has the shape "
                    f"{tuple(tensor.shape)}, this model needs {wanted[leaf]} (A {tuple(a.shape)}, B {tuple(b.shape)})"
                )
        return _Module(place, spelling, tensors)

    def _heads(
        self, config: TransformerConfig, held: dict[str, Tensor], prefix: str = "base_model.model."
    ) -> dict[str, Tensor]:
        """Heads that were trained in full, by bimo's names; nothing may be left behind them."""
        found = {}
        for name, written in head_names(config).items():
            for spelling in key_map(config).spellings(written):
                if f"{prefix}{spelling}" in held:
                    found[name] = held.pop(f"{prefix}{spelling}")
        if held:
            raise UnsupportedModelError(
                f"{self.folder / WEIGHTS} has {len(held)} tensors that bimo has no place for ({sorted(held)[0]}): it "
                f"knows changes of the matrices in a model's blocks, and an encoder's classifier"
            )
        return found

    # --- prefix ------------------------------------------------------------------------------------------------------

    def _read_prefix(
        self, config: TransformerConfig, held: dict[str, Tensor]
    ) -> tuple[AdapterRecipe, dict[str, Tensor]]:
        if isinstance(config, Seq2SeqConfig):
            raise UnsupportedModelError(f"{self.folder} is a prefix of an encoder-decoder, which bimo does not compute")
        tokens = self.num_places
        shape = (tokens, config.num_layers, 2, config.num_kv_heads, config.head_dim)
        values = held.pop(PREFIX_TENSOR, None)
        if values is None or tuple(values.shape) != (tokens, math.prod(shape[1:])):
            raise CorruptModelError(
                f"{self.folder} is a prefix for {self.base or 'another base'}: its {PREFIX_TENSOR} has the shape "
                f"{None if values is None else tuple(values.shape)}, this model needs {(tokens, math.prod(shape[1:]))}"
            )
        tensors: dict[str, Tensor] = {}
        for layer, (keys, others) in enumerate(tensor.unbind(1) for tensor in values.view(shape).unbind(1)):
            tensors |= {
                f"layers.{layer}.attention.prefix_keys": keys,
                f"layers.{layer}.attention.prefix_values": others,
            }
        return AdapterRecipe(kind="prefix", tokens=tokens), {**tensors, **self._heads(config, held, "base_model.")}


def read_adapter(folder: Path) -> AdapterFile:
    """What a directory says of its adapter. Raises CorruptModelError and UnsupportedModelError naming the file."""
    file = folder / CONFIG
    settings = Fields(read_json(file), str(file))
    kind = settings.text("peft_type")
    if kind not in KINDS:
        raise UnsupportedModelError(f"{file}: peft_type is {kind}, bimo knows {', '.join(KINDS)}")
    settings.only("bias", "none")
    settings.only("prefix_projection", False)
    if settings.raw.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise UnsupportedModelError(
            f"{file}: init_lora_weights {settings.raw['init_lora_weights']!r} changes the base's weights as well, so "
            f"the adapter alone says too little: convert it to a plain one with PEFT (save_pretrained's "
            f"path_initial_model_for_weight_conversion)"
        )
    for key, value in settings.raw.items():
        if key not in HARMLESS and value:
            raise UnsupportedModelError(f"{file}: {key} is {value!r:.60}, which bimo does not compute")
    base = settings.text("base_model_name_or_path", "")
    labels: tuple[str, ...] = ()
    mark = ""
    if (own := folder / "bimo.json").is_file():
        about = Fields(read_json(own), str(own))
        base = about.text("base", base)
        labels = tuple(about.texts("labels")) if about.has("labels") else ()
        mark = about.text("parent_mark", "")
    return AdapterFile(folder, KINDS[kind], base, labels, settings, mark)


@dataclass(frozen=True)
class _Module:
    """A module that a file changes, name: as it spells it."""

    place: Place
    name: str
    tensors: dict[str, Tensor]

    def named(self, **tensors: Tensor) -> dict[str, Tensor]:
        return {f"{self.place.name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def write_adapter(
    folder: Path,
    config: ModelConfig,
    recipe: AdapterRecipe,
    tensors: Mapping[str, Tensor],
    *,
    base: str,
    source: Path | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter's directory; it appears at once, or nothing changes. tensors: as `Adapter.to_file` gives them.
    source: directory whose tokenizer is copied. lineage: becomes bimo.json."""
    assert isinstance(config, DecoderConfig | EncoderConfig | Seq2SeqConfig)
    labels = config.labels if isinstance(config, EncoderConfig) else ()
    settings, named = _WRITERS[recipe.kind](config, recipe, tensors)
    heads = [name.rpartition(".")[0] for name in tensors if name in ("pooler.weight", "classifier.weight")]
    common: dict[str, Any] = {
        "peft_type": {kind: name for name, kind in KINDS.items()}[recipe.kind],
        "task_type": _task(config),
        "base_model_name_or_path": base.removeprefix("hf:"),
        "inference_mode": True,
        "modules_to_save": heads or None,
    }
    about: dict[str, Any] = {"base": base, "labels": list(labels), "adapter": recipe.model_dump(mode="json")}
    about = {"format": 1, **(lineage or {}), **about}
    with staged_directory(folder) as stage:
        _save(named, stage / WEIGHTS)
        for name in COMPANIONS if source is not None else ():
            if source is not None and (source / name).is_file():
                shutil.copyfile(source / name, stage / name)
        for name, content in ((CONFIG, {**common, **settings}), ("bimo.json", about)):
            with (stage / name).open("w", encoding="utf-8") as stream:
                json.dump(content, stream, indent=2, ensure_ascii=False, allow_nan=False)
                stream.flush()
                os.fsync(stream.fileno())


def _task(config: ModelConfig) -> str:
    if isinstance(config, DecoderConfig):
        return "CAUSAL_LM"
    if isinstance(config, Seq2SeqConfig):
        return "SEQ_2_SEQ_LM"
    return "SEQ_CLS" if isinstance(config, EncoderConfig) and config.labels else "FEATURE_EXTRACTION"


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_low_rank(
    config: TransformerConfig, recipe: AdapterRecipe, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    named: dict[str, Tensor] = {}
    ranks, alphas, kept, chosen = dict[str, int](), dict[str, float](), dict[str, list[bool]](), set[str]()
    initial, transposed = 0, False
    suffix = ".weight" if recipe.kind == "lora" else ""
    for place in places(config):
        own = place.name
        if f"{own}.lora_A" not in tensors:
            continue
        chosen.add(place.module)
        transposed = transposed or place.transposed
        file = f"base_model.model.{place.module}"
        for letter in "AB":
            named[f"{file}.lora_{letter}{suffix}"] = tensors[f"{own}.lora_{letter}"]
        rank, scale = len(tensors[f"{own}.lora_A"]), float(tensors[f"{own}.scale"])
        if recipe.kind == "adalora":
            named[f"{file}.lora_E"] = tensors[f"{own}.lora_E"]
            mask = tensors[f"{own}.kept"].tolist()
            initial, kept[f"{place.module}.lora_E"] = max(initial, len(mask)), mask
            continue
        if recipe.dora:
            named[f"{file}.lora_magnitude_vector"] = tensors[f"{own}.magnitude"]
        alpha = scale * (math.sqrt(rank) if recipe.rslora else rank)
        if rank != recipe.rank:
            ranks[place.module] = rank
        if not math.isclose(alpha, recipe.alpha, rel_tol=1e-6):
            alphas[place.module] = alpha
    settings: dict[str, Any] = {
        "lora_alpha": int(recipe.alpha) if recipe.alpha == int(recipe.alpha) else recipe.alpha,
        "lora_dropout": recipe.dropout,
        "target_modules": shortest_ends(chosen, config),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "init_lora_weights": True,
    }
    if recipe.kind == "adalora":
        # the schedule is for a training that goes on, which this file is not
        settings |= {"init_r": initial, "target_r": recipe.rank, "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}
        settings["rank_pattern"] = kept if not all(all(mask) for mask in kept.values()) else None
    else:
        settings |= {"r": recipe.rank, "use_rslora": recipe.rslora, "use_dora": recipe.dora, "rank_pattern": ranks}
        settings["alpha_pattern"] = alphas
    return settings, {**named, **_written_heads(config, tensors)}


def _write_prefix(
    config: TransformerConfig, recipe: AdapterRecipe, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    import torch

    assert not isinstance(config, Seq2SeqConfig)
    pairs = [
        tensors[f"layers.{layer}.attention.prefix_{kind}"]
        for layer in range(config.num_layers)
        for kind in ("keys", "values")
    ]
    settings = {
        "num_virtual_tokens": recipe.tokens,
        "token_dim": config.num_kv_heads * config.head_dim,
        "num_attention_heads": config.num_kv_heads,
        "num_layers": config.num_layers,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": config.hidden_size,
        "prefix_projection": False,
    }
    named = {PREFIX_TENSOR: torch.stack(pairs, 1).flatten(1)}
    return settings, {**named, **_written_heads(config, tensors, "base_model.")}


def _write_bottleneck(
    config: TransformerConfig, recipe: AdapterRecipe, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {"width": recipe.width, "base_family": config.family}, dict(tensors)


_WRITERS = {"lora": _write_low_rank, "adalora": _write_low_rank, "prefix": _write_prefix,
            "bottleneck": _write_bottleneck}  # fmt: skip


def _written_heads(
    config: TransformerConfig, tensors: Mapping[str, Tensor], prefix: str = "base_model.model."
) -> dict[str, Tensor]:
    return {f"{prefix}{written}": tensors[name] for name, written in head_names(config).items() if name in tensors}


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as error:  # the library's word for an OSError
        raise OSError(str(error)) from error
    file.chmod(0o644)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        if pickles := sorted(file.parent.glob("adapter_model.*")):
            raise UnsupportedModelError(
                f"{pickles[0]} is a pickle, which can run code when read, so bimo reads only safetensors: save the "
                f"adapter again with PEFT's save_pretrained"
            )
        raise CorruptModelError(f"{file} is missing: fetch the adapter again")
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptModelError(
            f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file ({error}): fetch the adapter again"
        ) from None
    if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise CorruptModelError(f"{file}: {bad[0]} has values that are not numbers: the training went wrong")
    return tensors


def _scalar(value: float) -> Tensor:
    import torch

    return torch.tensor(value, dtype=torch.float64)
