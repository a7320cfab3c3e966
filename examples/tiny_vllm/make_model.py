"""Make a tiny random Qwen3 model with its own tokenizer and chat template: seconds, no download.

Run by an interpreter that has vLLM (torch, transformers, tokenizers):

    python make_model.py DIRECTORY

The same versions of those libraries make the same files. The weights are noise; what the model says is
decided by `scripted.Scripted`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

# CPU only: the import of transformers must not look for models on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")
LEARNED_VOCABULARY = 1500
MAX_POSITIONS = 8192

# The word splitter of the Qwen family.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CORPUS = (
    "Hello! How can I help you today? Let me think about that for a moment. The user says hi, so a short "
    "greeting is enough. The weather in Paris is sunny with a light wind from the west.",
    "A penstock is a gate that lets exactly as much water through as the turbine can take. It can be shut.",
    "Streaming means that the answer arrives word by word, and each token is shown as soon as it is ready.",
    "First we look at the question, then we check the facts, and finally we write the answer in plain words.",
    "Okay, the user wants to know the weather. I should call get_weather with the city and the unit.",
    "One two three four five six seven eight nine ten. January February March April May June July August.",
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.",
    '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}',
    '{"name": "search", "arguments": {"query": "river level", "limit": 10, "exact": true, "page": null}}',
    '{"id": 12345, "items": [{"title": "first", "price": 9.99}, {"title": "second", "price": -0.5}]}',
    "def answer(question: str) -> str:\n    return question.upper()\n\nfor line in lines:\n    print(line)\n",
    "## Heading\n\n- item one\n- item two\n\n| city | °C |\n|---|---|\n| Paris | 21 |\n\n```python\nx = 1\n```",
    "你好，世界！今天的天气很好，我们去公园散步吧。请问你想知道什么？",
    "こんにちは世界。今日はとても良い天気ですね。東京の天気を教えてください。",
    "안녕하세요 세계. 오늘 날씨가 아주 좋습니다.",
    "Привет, мир! Сегодня хорошая погода. Γειά σου Κόσμε. مرحبا بالعالم. שלום עולם. नमस्ते दुनिया।",
    "Crème brûlée, naïve café, Zürich, smørrebrød, piñata, déjà vu, Ångström, čeština, façade.",
    "😀 😂 🎉 👍 🚀 ❤️ 🌍 ☀️ 😀😂 🎉🎉 👍🏽 🇫🇷 🇯🇵 ✅ ⚠️ 🤖",
)

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- '# Tools\\n\\nYou may call these functions:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
    {{- '\\n</tools>\\n\\nFor each call, return JSON within <tool_call></tool_call> tags:\\n' }}
    {{- '<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {%- set arguments = call.function.arguments %}
            {{- arguments if arguments is string else arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- elif open_think is defined and open_think %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be written, and every single byte is a token of its own too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED_VOCABULARY,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in MARKUP])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(vocabulary: int, eos: list[int], pad: int) -> Qwen3ForCausalLM:
    torch.manual_seed(20260101)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        eos_token_id=eos[0],
        pad_token_id=pad,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return model


def write_model(directory: Path) -> None:
    """Write all files of the model; `directory` appears whole or not at all."""
    half = directory.with_name(f"{directory.name}.part{os.getpid()}")
    tokenizer = make_tokenizer()
    end, pad = (tokenizer.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>"))
    # vLLM's CPU kernels like round sizes; ids past the tokenizer are never scripted.
    vocabulary = -(-len(tokenizer) // 64) * 64
    tokenizer.save_pretrained(half)
    make_model(vocabulary, [end, pad], pad).save_pretrained(half)
    if directory.exists():
        shutil.rmtree(half)
    else:
        half.rename(directory)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_model(target)
    print(json.dumps({"model": str(target), "files": sorted(path.name for path in target.iterdir())}))
