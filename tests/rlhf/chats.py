"""Chat templates of known model families, written from their public formats, on the tiny tokenizer.

`{% generation %}` marks what an assistant writes, so that transformers can say on its own which tokens those are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.tiny import make_tiny_tokenizer


@dataclass(frozen=True)
class Family:
    """A template, the special tokens that it needs, and whether it takes a system message."""

    jinja: str
    tokens: tuple[str, ...] = ()
    system: bool = True


def _loop(head: str, body: str, end: str, after: str = "", *, role: str = "message['role']", opening: str) -> str:
    """A template that writes every message alike."""
    content = f"{{{{ {body} + {end} }}}}"
    return (
        "{% for message in messages %}"
        f"{{{{ {head.format(role=role)} }}}}"
        f"{{% if message['role'] == 'assistant' %}}{{% generation %}}{content}{{% endgeneration %}}"
        f"{{% else %}}{content}{{% endif %}}{{{{ '{after}' }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '{opening}' }}}}{{% endif %}}"
    )


_CHATML = _loop(
    "'<|im_start|>' + {role} + '\\n'",
    "message['content']",
    "'<|im_end|>'",
    "\\n",
    opening="<|im_start|>assistant\\n",
)
_NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"

FAMILIES = {
    "chatml": Family(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "chatml with a default system message": Family(
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}" + _CHATML,
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama 3": Family(
        "{{ bos_token }}"
        + _loop(
            "'<|start_header_id|>' + {role} + '<|end_header_id|>\\n\\n'",
            "message['content'] | trim",
            "'<|eot_id|>'",
            opening="<|start_header_id|>assistant<|end_header_id|>\\n\\n",
        ),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Family(
        "{{ bos_token }}" + _NO_SYSTEM + "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}",
        ("[INST]", "[/INST]"),
        system=False,
    ),
    "gemma": Family(
        "{{ bos_token }}"
        + _NO_SYSTEM
        + _loop(
            "'<start_of_turn>' + {role} + '\\n'",
            "message['content'] | trim",
            "'<end_of_turn>'",
            "\\n",
            role="('model' if message['role'] == 'assistant' else message['role'])",
            opening="<start_of_turn>model\\n",
        ),
        ("<start_of_turn>", "<end_of_turn>"),
        system=False,
    ),
    "zephyr": Family(  # its role tags are plain text, its end of a turn is the end of text
        _loop("'<|' + {role} + '|>\\n'", "message['content']", "eos_token", "\\n", opening="<|assistant|>\\n")
    ),
    "phi 3": Family(
        _loop(
            "'<|' + {role} + '|>\\n'",
            "message['content']",
            "'<|end|>'",
            "\\n",
            opening="<|assistant|>\\n",
        )
        + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        ("<|end|>",),
    ),
}

# Reasoning stands in the last answer alone; a last answer without any gets an empty passage.
DROPS_REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}"
    "{% if not loop.last %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{% elif '</think>' not in content %}{% set content = '<think>\\n\\n</think>\\n\\n' + content %}{% endif %}"
    "{% endif %}"
    "{{ content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The system message stands in the last turn of the conversation, if that is the user's, and else nowhere.
MOVES_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
    "{{ message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def family_folder(folder: Path, name: str) -> Path:
    """`folder`, now holding the tiny tokenizer with the template and the special tokens of a family."""
    return tokenizer_folder(folder, FAMILIES[name].jinja, *FAMILIES[name].tokens)


def tokenizer_folder(folder: Path, jinja: str, *tokens: str) -> Path:
    """`folder`, now holding the tiny tokenizer with a template and more special tokens."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.chat_template = jinja
    tokenizer.save_pretrained(folder)
    return folder
