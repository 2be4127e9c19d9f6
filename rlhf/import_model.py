"""`tenfold import-model`: a base model, from wherever it is, into a folder in Hugging Face layout."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from configs.schema import Dtype
from rlhf.disk import sync_folder
from rlhf.errors import ModelError
from rlhf.ports import Console

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
GGUF_MAGIC = b"GGUF"
# transformers adds it to a GGUF file's tokenizer that lacks it, with an id that the model has no embedding for.
GGUF_SURPLUS = "<|endoftext|>"


def import_model(source: str, dest: Path, *, console: Console, dtype: Dtype | None = None) -> Path:
    """`dest`, now a folder with config, weights (safetensors), tokenizer and generation settings.

    `source` is a GGUF file, which is de-quantised, a folder in Hugging Face layout, or the name of a model on a hub.
    Weights come out as `dtype`; None: float32 from a GGUF file, else as they are stored. `dest` appears whole or not
    at all; a complete model that is there already is left alone.

    Raises ModelError for a source that is missing, unreadable or no decoder-only language model, for a `dest` that
    holds something else, and for one that cannot be written.
    """
    if is_complete(dest):
        console.say(f"{dest} holds a model already. To import again, delete that folder first.")
        return dest
    _check_dest(dest)
    where = _find(source)
    with console.task(f"import {Path(source).name}") as task, quiet_transformers():
        task.advance(0, "reading the weights" if "gguf_file" not in where else "de-quantising the weights")
        model, tokenizer = _load(source, where, dtype)
        task.advance(0, "checking")
        _check(source, model, tokenizer)
        set_end_tokens(model, tokenizer)
        if not tokenizer.chat_template:
            console.warn(
                f"{source} has no chat template, so Tenfold cannot write prompts for it as they are. "
                f"Put the one that it was trained with into {dest / 'chat_template.jinja'}."
            )
        task.advance(0, "writing")
        with writing(dest) as folder:
            model.save_pretrained(folder)
            _save_tokenizer(tokenizer, _surplus(model, tokenizer), folder)
    console.say(f"{dest}: {_size(model)} parameters, {str(model.dtype).removeprefix('torch.')}.")
    return dest


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a config, a tokenizer and every safetensors file that its index names."""
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json")):
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return all((folder / name).is_file() for name in names)


def _check_dest(dest: Path) -> None:
    if dest.exists() and not dest.is_dir():
        raise ModelError(f"{dest} is a file.", remedy="Name a folder that does not exist yet.")
    if dest.is_dir() and any(dest.iterdir()):
        raise ModelError(
            f"{dest} holds something that is not a complete model.",
            remedy="Name a folder that does not exist yet, or delete this one.",
        )


def _find(source: str) -> dict[str, Any]:
    """What `from_pretrained` needs to find the source."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{source} has no config.json, so it is not a model in Hugging Face layout.",
                remedy="Name the folder that config.json and the weights are in, or a GGUF file.",
            )
        return {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
        if magic != GGUF_MAGIC:
            raise ModelError(
                f"{source} is not a GGUF file: it starts with {magic!r}.",
                limit=f"A GGUF file starts with {GGUF_MAGIC!r}.",
                remedy="Name a GGUF file, or the folder of a model in Hugging Face layout.",
            )
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if source.endswith(".gguf") or not HUB_NAME.fullmatch(source) or ("/" in source and path.parent.is_dir()):
        raise ModelError(
            f"{source} does not exist.",
            remedy="Name a GGUF file, a folder in Hugging Face layout, or a model on a hub as owner/name.",
        )
    return {"pretrained_model_name_or_path": source}


def _load(source: str, where: dict[str, Any], dtype: Dtype | None) -> tuple[Any, Any]:
    kind = dtype or ("float32" if "gguf_file" in where else "auto")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            **where, dtype=kind if kind == "auto" else getattr(torch, kind), output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # transformers raises almost anything for a file that it cannot read
        raise _unreadable(source, where, error) from error
    if info["missing_keys"]:
        raise ModelError(
            f"{source} lacks weights: {_some(info['missing_keys'])}.",
            remedy="Fetch the model again, complete, or name a causal language model.",
        )
    # These marks of a de-quantised model would keep save_pretrained from writing plain weights.
    if getattr(model.config, "quantization_config", None) is not None and "gguf_file" in where:
        model.hf_quantizer = None
        del model.config.quantization_config
    return model, tokenizer


def _unreadable(source: str, where: dict[str, Any], error: Exception) -> ModelError:
    reason = (str(error).strip().splitlines() or [""])[0]
    if Path(where["pretrained_model_name_or_path"]).is_dir():
        return ModelError(
            f"{source} cannot be read as a causal language model: {type(error).__name__}: {reason}.",
            remedy="Check that the download is complete, and that this version of transformers "
            f"({transformers.__version__}) knows the architecture.",
        )
    return ModelError(
        f"{source} is no file or folder here, and the hub did not give it: {reason}.",
        remedy="Check the spelling (owner/name) and the network; unset HF_HUB_OFFLINE if it is set; or fetch the model "
        "elsewhere and name its folder.",
    )


def _check(source: str, model: Any, tokenizer: Any) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source} is a {model.config.model_type}, an encoder and a decoder.",
            limit="Tenfold aligns decoder-only models.",
        )
    num_embeddings = model.get_input_embeddings().num_embeddings
    surplus = _surplus(model, tokenizer) - {GGUF_SURPLUS}
    if surplus:
        raise ModelError(
            f"The tokenizer of {source} has tokens that the model has no embedding for: {_some(surplus)}.",
            limit=f"The model embeds {num_embeddings} tokens.",
            remedy="Use the tokenizer that the model was trained with.",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of {source} names no end-of-sequence token, so an answer could not end.",
            remedy="Set eos_token in its tokenizer_config.json.",
        )
    broken = [name for name, tensor in model.named_parameters() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ModelError(
            f"{source} holds weights that are not finite numbers: {_some(broken)}.",
            remedy="Fetch the model again: the file is probably damaged.",
        )


def _surplus(model: Any, tokenizer: Any) -> set[str]:
    num_embeddings = model.get_input_embeddings().num_embeddings
    return {token for token, index in tokenizer.get_vocab().items() if index >= num_embeddings}


def _save_tokenizer(tokenizer: Any, surplus: set[str], folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    if surplus and file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in surplus]
        file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def set_end_tokens(model: Any, tokenizer: Any) -> None:
    """Makes generation end at each token that ends a text or a turn; a GGUF file names only one of them."""
    known = model.generation_config.eos_token_id
    ids = set(known if isinstance(known, list) else [known]) | {tokenizer.eos_token_id, _turn_end(tokenizer)}
    ends = sorted(ids - {None})
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template writes right after an assistant's words."""
    if not tokenizer.chat_template:
        return None
    said = "tenfold"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template is a program of the model's author, and some refuse some chats
        return None
    after = tokenizer.encode(text.rpartition(said)[2], add_special_tokens=False)
    special = after and tokenizer.added_tokens_decoder.get(after[0])
    return after[0] if special and special.special else None


@contextmanager
def writing(dest: Path) -> Iterator[Path]:
    """A folder beside `dest` that takes its place when the block ends well, and vanishes otherwise."""
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".tmp-{dest.name}-", dir=dest.parent))
        try:
            yield folder
            folder.chmod(0o755)
            for file in folder.iterdir():
                file.chmod(0o644)  # safetensors makes its files private
            sync_folder(folder)
            folder.replace(dest)
            sync_folder(dest.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{dest} cannot be written: {error}.",
            remedy="Name a folder on a disk that you may write to and that has room.",
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers: the console tells how far the work is."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which else warns that it found none
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # de-quantising has a bar that no setting turns off
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def _size(model: Any) -> str:
    num = sum(parameter.numel() for parameter in model.parameters())
    return f"{num / 1e9:.2f} billion" if num >= 1e9 else f"{num / 1e6:.1f} million"
