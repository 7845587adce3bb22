"""What a chat model says and where it stops is the same here, in transformers and in llama.cpp.

No random model stops by itself. This one's head is made so that each token has two likely
successors, letters a little further on in the alphabet, and the end of the answer behind the last.
Which of the two comes is decided by what random attention makes of the whole conversation.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import string
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import pytest
from small_models import KINDS, random_params, write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stablelm_jax import convert
from stablelm_jax.checkpoint.saved_model import SavedModel
from stablelm_jax.generation.generator import Generator
from stablelm_jax.interop import from_hf
from stablelm_jax.model.parameters import nest
from stablelm_jax.tokenizer.chat import (
    ChatTemplate,
    chat_template,
    encode_chat,
    render_chat,
    stop_ids,
    template_of,
)
from stablelm_jax.tokenizer.tokenizer import load_tokenizer

MODEL = dataclasses.replace(KINDS["1.6b"], num_layers=2)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NEW = 40
SCALE = 12  # of the embedding, beside what the layers add
CHATS = [
    [{"role": "user", "content": "Wie heißt du?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi,  you\nthere"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ],
]


def write_tokenizer(path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "th"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))  # llama.cpp wants a merge
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(path))
    return path


def params_that_end(tokenizer, ender, seed=3):
    rng = np.random.default_rng(seed)
    print("seed", seed)
    params = random_params(MODEL, seed)
    letters = np.array([tokenizer.encode(letter)[0] for letter in string.ascii_letters])
    embedding_VD = params["embed/embedding"]
    embedding_VD *= SCALE / np.linalg.norm(embedding_VD, axis=1, keepdims=True)
    (newline,) = tokenizer.encode("\n")  # which ends every prompt
    for place, token in enumerate([newline, *letters]):
        for step in rng.choice(8, 2, replace=False):
            successor = letters[place + step] if place + step < len(letters) else ender
            params["head/kernel"][:, successor] += embedding_VD[token]
    return params


@dataclasses.dataclass
class Chat:
    """A checkpoint with a template, ids of each conversation and of what our model answers."""

    path: Path
    template: ChatTemplate
    end: int
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module", params=["zephyr", "chatml"])
def chat(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    file = write_tokenizer(folder / "tokenizer.json")
    tokenizer = load_tokenizer(file)
    template = chat_template(request.param, tokenizer)
    stops = stop_ids(tokenizer, template)
    params = params_that_end(tokenizer, stops[0])
    run = {"chat": template.to_json(), "max_positions": 256}
    path = write_checkpoint(folder / "global_step1", MODEL, params, file, **run)
    prompts = [encode_chat(tokenizer, messages, template) for messages in CHATS]
    generator = Generator(MODEL, nest(params), batch_size=len(CHATS), max_length=256, chunk=NEW)
    answers = generator.generate(prompts, max_new_tokens=NEW, stop_tokens=stops)
    assert all(0 < len(answer) < NEW for answer in answers) and answers[0] != answers[1]
    return Chat(path, template, stops[0], prompts, answers)


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def exported(chat):
    """(chat, its Hugging Face directory)"""
    out = chat.path.parent / "hf"
    assert run("to-hf", chat.path, out, "--dtype=float32", "--no-verify") == 0
    return chat, out


# --- what other software makes of it ---


@pytest.mark.parity
def test_transformers_makes_our_prompt_and_stops_where_we_stop(exported):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    chat, out = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert tokenizer.eos_token_id == chat.end
    for messages, prompt, answer in zip(CHATS, chat.prompts, chat.answers):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert inputs["input_ids"][0].tolist() == prompt
        with torch.no_grad():
            whole = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0].tolist()
        assert whole[len(prompt) :] == [*answer, chat.end]


@pytest.mark.parity
def test_llama_cpp_makes_our_prompt_and_stops_where_we_stop(chat):
    ask = served(chat.path, chat.path.parent / "model.gguf")
    tokenizer = SavedModel.open(chat.path).tokenizer
    for messages, prompt, answer in zip(CHATS, chat.prompts, chat.answers):
        asked = ask("/apply-template", messages=messages)
        assert asked["prompt"] == render_chat(messages, chat.template)
        wanted = {"n_predict": NEW, "temperature": 0.0, "return_tokens": True}
        found = ask("/completion", prompt=prompt, **wanted)
        assert (found["tokens"], found["stop_type"]) == ([*answer, chat.end], "eos")
        found = ask("/v1/chat/completions", messages=messages, temperature=0.0)
        (choice,) = found["choices"]
        assert choice["message"]["content"] == tokenizer.decode(answer)
        assert choice["finish_reason"] == "stop"
        assert found["usage"]["prompt_tokens"] == len(prompt)


def served(checkpoint, out):
    """llama.cpp's own server, whose templates are its own Jinja, on a checkpoint: f(what, ...)."""
    xllamacpp = pytest.importorskip("xllamacpp")
    assert run("to-gguf", checkpoint, out, "--type=f32", "--no-verify") == 0
    given = xllamacpp.CommonParams()
    given.model.path, given.n_ctx, given.n_parallel = str(out), 257, 1
    given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    given.warmup, given.fit_params, given.verbosity = False, False, -1
    server = xllamacpp.Server(given)

    def ask(what, **wanted):
        request = urllib.request.Request(
            server.listening_address + what,
            data=json.dumps(wanted).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    return ask


# --- the files ---


def test_the_export_names_the_template_and_every_ender(exported):
    chat, out = exported
    config, generation = (
        json.loads((out / name).read_text())
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    assert (out / "chat_template.jinja").read_text() == chat.template.jinja
    assert config["chat_template"] == chat.template.jinja  # for older versions
    assert config["add_bos_token"] is False and config["eos_token"] == chat.template.enders[0]
    ends = stop_ids(SavedModel.open(chat.path).tokenizer, chat.template)
    assert generation["eos_token_id"] == (ends if len(ends) > 1 else ends[0])
    assert generation["bos_token_id"] == generation["pad_token_id"] == 257


def test_a_gguf_file_names_the_end_of_a_turn_and_the_template_without_what_only_transformers_knows(
    tmp_path,
):
    file = write_tokenizer(tmp_path / "tokenizer.json")
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    template = template_of("marked", marked, load_tokenizer(file))
    chat = {"chat": template.to_json()}
    path = write_checkpoint(tmp_path / "global_step1", MODEL, random_params(MODEL), file, **chat)
    assert run("to-gguf", path, tmp_path / "m.gguf", "--no-verify") == 0
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields
    ids = [field[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "bos")]
    assert ids == [259, 259, 257]
    written = field["tokenizer.chat_template"].contents()
    assert "generation %}" not in written and "<|im_end|>" in written
    assert run("to-hf", path, tmp_path / "hf", "--no-verify") == 0
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == written


def test_a_base_model_s_exports_know_no_chat(tmp_path):
    file = write_tokenizer(tmp_path / "tokenizer.json")
    path = write_checkpoint(tmp_path / "global_step1", MODEL, random_params(MODEL), file)
    assert run("to-hf", path, tmp_path / "hf", "--no-verify") == 0
    assert run("to-gguf", path, tmp_path / "m.gguf", "--no-verify") == 0
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    assert "chat_template" not in (tmp_path / "hf" / "tokenizer_config.json").read_text()
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert not {"tokenizer.chat_template", "tokenizer.ggml.eot_token_id"} & fields.keys()


# --- from Hugging Face ---

# The shapes of the published directories: zephyr has one token for all, in the template by name.
OF_ZEPHYR = (
    "{% for message in messages %}\r\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}\n"
)
OF_CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PUBLISHED = {
    "zephyr": (OF_ZEPHYR, "<|endoftext|>", 257, ("<|endoftext|>",)),
    "chat": (OF_CHAT, "<|im_end|>", 259, ("<|im_end|>", "<|endoftext|>")),
}


@pytest.fixture
def directory(tmp_path, base_directory):
    return shutil.copytree(base_directory, tmp_path / "hf")


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    file = write_tokenizer(folder / "tokenizer.json")
    path = write_checkpoint(folder / "global_step1", MODEL, random_params(MODEL), file)
    assert run("to-hf", path, folder / "hf", "--dtype=float32", "--no-verify") == 0
    return folder / "hf"


def rewrite(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def published(directory, kind, *, where):
    """Makes of an export of a base one of the layout in which a chat model was published."""
    jinja, ender, end_id, _ = PUBLISHED[kind]
    token = {"content": ender, "lstrip": False, "normalized": False, "special": True}
    rewrite(directory / "generation_config.json", eos_token_id=end_id)
    rewrite(directory / "config.json", eos_token_id=end_id)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": jinja}]
    kept = {"config": {"chat_template": jinja}, "list": {"chat_template": named}, "file": {}}
    rewrite(directory / "tokenizer_config.json", eos_token=token, **kept[where])
    if where == "file":
        (directory / "chat_template.jinja").write_bytes(jinja.encode())


@pytest.mark.parametrize("where", ["config", "list", "file"])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_template_of_a_published_layout_is_found_with_what_ends_its_answers(
    directory, kind, where
):
    published(directory, kind, where=where)
    found = from_hf.open_directory(directory)
    chat = from_hf.chat_of(found)
    assert found.chat_template == PUBLISHED[kind][0] and chat.enders == PUBLISHED[kind][3]
    messages = [{"role": "user", "content": "a"}]
    written = {"zephyr": "<|user|>\na<|endoftext|>\n<|assistant|>\n"}
    written["chat"] = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert render_chat(messages, chat) == written[kind]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_there_and_back_the_template_keeps_every_byte(directory, tmp_path, kind, capsys):
    published(directory, kind, where="file")
    assert run("from-hf", directory, tmp_path / "in", "--no-verify") == 0
    assert "ends an answer with" in capsys.readouterr().err
    own = SavedModel.open(tmp_path / "in")
    assert own.chat.enders == PUBLISHED[kind][3] and own.end_ids[0] == PUBLISHED[kind][2]
    assert run("to-hf", tmp_path / "in", tmp_path / "out", "--no-verify") == 0
    back = (tmp_path / "out" / "chat_template.jinja").read_bytes()
    assert back == PUBLISHED[kind][0].encode()
    again = from_hf.open_directory(tmp_path / "out")
    assert again.chat_template.encode() == back and again.end_ids == tuple(own.end_ids)


@pytest.mark.parametrize(
    ("jinja", "why"),
    [("{% for %}", "Expected"), ("{{ messages[0].content }}", "a message"), ("plain", "a message")],
)
def test_a_template_that_is_of_no_use_goes_along_and_it_is_said(
    directory, tmp_path, jinja, why, capsys
):
    (directory / "chat_template.jinja").write_text(jinja)
    assert run("from-hf", directory, tmp_path / "in", "--no-verify") == 0
    said = capsys.readouterr().err
    assert "is of no use here" in said and why in said
    assert SavedModel.open(tmp_path / "in").chat_template == jinja
