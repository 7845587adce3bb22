"""trl gives the same losses and gradients, on transformers' StableLM, from the same conversations.

trl reads them through its own tokenizer and collators, one conversation a row; here they are
encoded by our template and lie packed in one row.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from chats import MODEL, Document, packed
from seeds import new_rng
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers_models import their_model as stablelm

from stablelm_jax.interop.tensor_map import tensors
from stablelm_jax.model.compute import Compute
from stablelm_jax.model.parameters import nest, parameter_table
from stablelm_jax.tokenizer.chat import chat_template, encode_conversation
from stablelm_jax.tokenizer.tokenizer import load_tokenizer
from stablelm_jax.training.objectives import PairObjective, TokenObjective, mean_loss

pytestmark = pytest.mark.parity
trl = pytest.importorskip("trl")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

SIZES = dataclasses.replace(MODEL, vocab_size=288)
COMPUTE = Compute(attention="reference", cross_entropy="saved")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Without what stands after the last turn: trl would count the newline as part of an answer.
THEIR_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{{- m.content + '<|im_end|>' }}"
    "{% endgeneration %}{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}"
    "{%- if add_generation_prompt or not loop.last %}{{- '\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
PAIRS = [
    ([("system", "Be brief."), ("user", "Name a tree.")], "Oak.", "There are a great many trees."),
    ([("user", "1+1?"), ("assistant", "2"), ("user", "And 2+2?")], "4, since 2+2 is 4.", "5"),
    ([("user", "Say hello in Spanish.")], "¡Hola!", "Bonjour !"),
]


def turns(pair):
    return [{"role": role, "content": content} for role, content in pair[0]]


def answered(pair, side):
    return [*turns(pair), {"role": "assistant", "content": pair[side]}]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The same bytes and special tokens: ours, and transformers' with the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate([*alphabet, *SPECIALS])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=THEIR_TEMPLATE,
    )
    return load_tokenizer(path), theirs


def new_params(rng, near=None):
    """Random, biases and norms too; `near`: those plus a little noise."""
    return {
        row.name: (
            rng.normal(row.init_std == "ones", 0.1, row.shape)
            if near is None
            else near[row.name] + rng.normal(0, 0.02, row.shape)
        ).astype(np.float32)
        for row in parameter_table(SIZES)
    }


def their_model(params):
    model = stablelm(SIZES, use_cache=False, pad_token_id=256)
    weights = {t.name: t.theirs(params[t.ours]) for t in tensors(SIZES)}
    model.load_state_dict({k: torch.tensor(np.ascontiguousarray(v)) for k, v in weights.items()})
    return model.train()


@pytest.fixture(scope="module")
def policy():
    """(weights, those of the reference)."""
    reference = new_params(rng := new_rng())
    return new_params(rng, reference), reference


def documents(tokenizer, conversations):
    template, found = chat_template("chatml", tokenizer), []
    for messages in conversations:
        ids, spans = encode_conversation(tokenizer, messages, template)
        ids = ids[: spans[-1][1]]
        targets = np.arange(1, len(ids))
        trained = np.any([(a <= targets) & (targets < b) for a, b in spans], axis=0)
        found.append(Document(np.array(ids, np.int32), trained))
    return found


@functools.partial(jax.jit, static_argnums=0)
def with_gradient(objective, params, batch):
    def loss(params):
        return objective.loss(SIZES, params, batch, objective.count(batch), compute=COMPUTE)

    gradients, sums = jax.grad(loss, has_aux=True)(params)
    return mean_loss(objective, sums), gradients


def flat(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(value)


def assert_equal(ours, gradients, theirs, model):
    assert float(ours) == pytest.approx(theirs.item(), rel=2e-5)
    gradients, parameters = dict(flat(gradients)), dict(model.named_parameters())
    for tensor in tensors(SIZES):
        if not tensor.absent:
            expected = parameters[tensor.name].grad.numpy()
            off = np.abs(tensor.theirs(gradients[tensor.ours]) - expected).max()
            assert off <= 2e-5 * np.abs(expected).max(), tensor.name


def trainer(kind, model, data, tokenizer, folder, **options):
    config, trained = {"dpo": ("DPOConfig", "DPOTrainer"), "sft": ("SFTConfig", "SFTTrainer")}[kind]
    reference = {key: options.pop(key) for key in ("ref_model",) if key in options}
    settings = getattr(trl, config)(
        output_dir=str(folder),
        per_device_train_batch_size=len(data),
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
        max_length=None,
        **options,
    )
    rows = datasets.Dataset.from_list(data)
    built = getattr(trl, trained)(
        model=model, args=settings, train_dataset=rows, processing_class=tokenizer, **reference
    )
    batch = built.data_collator([built.train_dataset[i] for i in range(len(data))])
    loss = built.compute_loss(model, batch)
    loss.backward()
    return loss


CASES = {
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}),
    "ipo": ({"kind": "ipo"}, {"loss_type": ["ipo"]}),
    "normalised": ({"length_normalised": True}, {"loss_type": ["sigmoid_norm"]}),
    "sft": (
        {"sft_weight": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_dpo_is_trls(case, policy, tokenizers, tmp_path):
    ours, theirs = CASES[case]
    params, reference = policy
    sides = [answered(pair, side) for pair in PAIRS for side in (1, 2)]
    found = documents(tokenizers[0], sides)
    for document in found:  # trl counts the last answer alone
        last = np.flatnonzero(np.diff(document.trained, prepend=0) > 0)[-1]
        document.trained[:last] = False
    batch = packed([found], [0], length=640)
    batch["pair_ids"] = np.arange(len(PAIRS), dtype=np.int32)[None]
    batch["reference"] = np.zeros((1, len(PAIRS), 2), np.float32)
    objective = PairObjective(1, 0.1, **ours)
    _, parts = objective.measure(SIZES, nest(reference), batch, compute=COMPUTE)
    batch["reference"] = np.asarray(parts["logps"])
    loss, gradients = with_gradient(objective, nest(params), batch)

    data = [
        {
            "prompt": turns(pair),
            "chosen": answered(pair, 1)[-1:],
            "rejected": answered(pair, 2)[-1:],
        }
        for pair in PAIRS
    ]
    model, options = their_model(params), {"beta": 0.1, "ref_model": their_model(reference)}
    expected = trainer("dpo", model, data, tokenizers[1], tmp_path, **options, **theirs)
    assert_equal(loss, gradients, expected, model)


@pytest.mark.parametrize("loss_on", ["answers", "all"])
def test_sft_is_trls(loss_on, policy, tokenizers, tmp_path):
    conversations = [answered(pair, 1) for pair in PAIRS]
    found = documents(tokenizers[0], conversations)
    if loss_on == "all":
        for document in found:
            document.trained[:] = True
    batch = packed([found], [0], length=320)
    loss, gradients = with_gradient(TokenObjective(1, "sft"), nest(policy[0]), batch)
    model, data = their_model(policy[0]), [{"messages": messages} for messages in conversations]
    only = {"assistant_only_loss": loss_on == "answers"}
    expected = trainer("sft", model, data, tokenizers[1], tmp_path, **only)
    assert_equal(loss, gradients, expected, model)
