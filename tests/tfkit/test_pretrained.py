"""Published checkpoints: every layout against its peer on tiny random weights, and every way a file can fail to fit."""

import json
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tfkit import pretrained
from tfkit.pretrained import Layout
from tfkit.zoo.attention_variants import grouped_rotary_attention
from tfkit.zoo.depth_and_residuals import cait
from tfkit.zoo.experts_and_elastic_width import mixtral
from tfkit.zoo.feedforward import llama
from tfkit.zoo.normalization import MaskedLanguageModel, bert, t5
from tfkit.zoo.transformer import gpt2

transformers = pytest.importorskip("transformers")
IDS = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))


def shaken(model: nn.Module) -> nn.Module:
    """Every parameter moved, so that no zero bias or unit gain can be mistaken for another."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def peer_gpt2(**given):
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2} | given
    return shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)))


def peer_llama(**given):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**(sizes | {"num_attention_heads": 4, "rms_norm_eps": 1e-6} | given))
    return shaken(transformers.LlamaForCausalLM(config))


def peer_mixtral():
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return shaken(transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, rope_theta=1e6)))


def grouped(base: float):
    return partial(grouped_rotary_attention, 16, 4, 2, base)


OURS = {
    "llama, grouped": (
        partial(peer_llama, num_key_value_heads=2, rope_theta=500.0),
        lambda: llama(40, 16, 2, hidden=24, mixer=grouped(500.0)),
    ),
    "mixtral": (peer_mixtral, lambda: mixtral(40, 16, 2, 24, 4, 2, mixer=grouped(1e6))),
    "gpt2": (peer_gpt2, lambda: gpt2(40, 16, 16, 2, 2)),
    "llama": (peer_llama, lambda: llama(40, 16, 2, 4, 24)),
}


def save(model, folder, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **given)
    return folder


@pytest.mark.parametrize("name", OURS)
def test_logits_of_transformers(name, tmp_path):
    peer, ours = OURS[name][0](), OURS[name][1]().eval()
    assert pretrained.load(ours, save(peer, tmp_path), name.split(",")[0]) is ours
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), peer(IDS).logits, atol=1e-5, rtol=1e-5)


def peer_bert():
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=12)
    return shaken(transformers.BertForPreTraining(config))


@pytest.mark.parametrize("old", [False, True], ids=["today's names", "names of 2018"])
def test_states_and_logits_of_transformers_bert(old, tmp_path):
    peer, file = peer_bert(), tmp_path / "model.safetensors"
    state = load_file(save(peer, tmp_path) / "model.safetensors")
    if old:
        state = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for name, value in state.items()
        }
        state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
        state["bert.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(state, file)
    segments, real = (IDS > 20).long(), torch.arange(9) < torch.tensor([[9], [6]])
    given = {"token_type_ids": segments, "attention_mask": real.long()}
    ours = pretrained.load(bert(40, 12, 16, 2, 4).eval(), file, "bert", ignore=("cls.*",))
    with torch.no_grad():
        expected, states = peer.bert(IDS, **given), ours(IDS, segments, real)
        torch.testing.assert_close(states[real], expected.last_hidden_state[real], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.summary(states), expected.pooler_output, atol=1e-5, rtol=1e-5)
    whole = MaskedLanguageModel(bert(40, 12, 16, 2, 4)).eval()
    pretrained.load(whole, file, "bert_masked", ignore=("cls.seq_relationship.*",))
    with torch.no_grad():
        logits = peer(IDS, **given).prediction_logits
        torch.testing.assert_close(whole(IDS, segments, real)[real], logits[real], atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="cls.predictions.bias is unknown"):
        pretrained.load(bert(40, 12, 16, 2, 4), file, "bert")


def test_logits_of_transformers_t5(tmp_path):
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    peer = shaken(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)))
    ours = pretrained.load(t5(40, 16, 2, 4, 24, 6).eval(), save(peer, tmp_path), "t5")
    source, target = torch.randint(40, (2, 30)), torch.randint(40, (2, 150))  # beyond the 128 that buckets tell apart
    with torch.no_grad():
        expected = peer(input_ids=source, decoder_input_ids=target).logits
        torch.testing.assert_close(ours(source, target), expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["pieces", "torch", "torch, old format", "torch, under model", "bare"])
def test_every_form_of_file_gives_the_same_weights(form, tmp_path):
    peer, whole, ours = peer_gpt2(), gpt2(40, 16, 16, 2, 2), gpt2(40, 16, 16, 2, 2)
    pretrained.load(whole, save(peer, tmp_path / "whole"), "gpt2")
    state, there = peer.state_dict(), tmp_path / "there"
    there.mkdir()
    if form == "pieces":
        save(peer, there, max_shard_size="5KB")
        assert len(list(there.glob("*.safetensors"))) > 2
    elif form == "bare":  # the model without its head, whose names have no prefix
        save(peer.transformer, there)
    elif form == "torch":
        torch.save(state, there / "pytorch_model.bin")
    elif form == "torch, old format":
        torch.save(state, there / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        there = there / "deep.pth"
        torch.save({"model": state, "epoch": 3}, there)
    pretrained.load(ours, there, "gpt2")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights by formula, the same on every machine: 0.5 sin(1.7 i), i counted on from tensor to tensor."""
    state, at = {}, 0
    for name, shape in shapes.items():
        n = torch.Size(shape).numel()
        state[name] = (0.5 * torch.sin(1.7 * torch.arange(at, at + n, dtype=torch.float64))).float().reshape(shape)
        at += n
    return state


def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """A weight of this shape and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def timm_block(name: str, d: int = 16, attention: dict | None = None) -> dict[str, tuple[int, ...]]:
    attention = attention or pair("attn.qkv", 3 * d, d) | pair("attn.proj", d, d)
    return {
        f"{name}.{key}": shape
        for key, shape in (
            pair("norm1", d) | attention | pair("norm2", d) | pair("mlp.fc1", 4 * d, d) | pair("mlp.fc2", d, 4 * d)
        ).items()
    }


def timm_cait_names() -> dict[str, tuple[int, ...]]:
    """Names, shapes and order of the state of timm's Cait(8, 4, num_classes=3, embed_dim=16, depth=2, num_heads=2)."""
    talking = (
        pair("attn.qkv", 48, 16) | pair("attn.proj", 16, 16) | pair("attn.proj_l", 2, 2) | pair("attn.proj_w", 2, 2)
    )
    looking = pair("attn.q", 16, 16) | pair("attn.k", 16, 16) | pair("attn.v", 16, 16) | pair("attn.proj", 16, 16)
    names = {"cls_token": (1, 1, 16), "pos_embed": (1, 4, 16)} | pair("patch_embed.proj", 16, 3, 4, 4)
    for kind, attention in (("blocks", talking), ("blocks_token_only", looking)):
        for i in range(2):
            gammas = {f"{kind}.{i}.gamma_1": (16,), f"{kind}.{i}.gamma_2": (16,)}
            names |= gammas | timm_block(f"{kind}.{i}", attention=attention)
    return names | pair("norm", 16) | pair("head", 3, 16)


PICTURES = torch.sin(0.7 * torch.arange(2 * 3 * 8 * 8, dtype=torch.float64)).float().reshape(2, 3, 8, 8)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_logits_of_timm_cait(prefix, tmp_path):
    """The expected numbers are those of timm 1.0.31 with the same weights and pictures."""
    state = numbered(timm_cait_names())
    torch.save({"model": {prefix + name: value for name, value in state.items()}}, tmp_path / "cait.pth")
    ours = pretrained.load(cait(8, 16, 2, 2, classes=3, patch=4).eval(), tmp_path / "cait.pth", "timm_cait")
    expected = [[-0.4582432, -1.6779476, 1.8526463], [-0.4582424, -1.6779464, 1.8526443]]
    with torch.no_grad():
        torch.testing.assert_close(ours(PICTURES), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def tiny_vit(hidden: int):
    zoo = pytest.importorskip("tfkit.zoo.vision_transformer")
    return zoo.vit(8, 4, 16, 2, 2, hidden=hidden, classes=3).eval()


def test_logits_of_timm_vit(tmp_path):
    """The expected numbers are those of timm 1.0.31 with the same weights and pictures."""
    names = {"cls_token": (1, 1, 16), "pos_embed": (1, 5, 16)} | pair("patch_embed.proj", 16, 3, 4, 4)
    names |= timm_block("blocks.0") | timm_block("blocks.1") | pair("norm", 16) | pair("head", 3, 16)
    torch.save(numbered(names), tmp_path / "vit.pth")
    ours = pretrained.load(tiny_vit(64), tmp_path / "vit.pth", "timm_vit")
    expected = [[-1.4169535, -1.352776, 2.5146229], [-1.4169423, -1.3528994, 2.5147293]]
    with torch.no_grad():
        torch.testing.assert_close(ours(PICTURES), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_logits_of_transformers_vit(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3, layer_norm_eps=1e-6)
    peer = shaken(transformers.ViTForImageClassification(config))
    ours = pretrained.load(tiny_vit(24), save(peer, tmp_path), "vit")
    with torch.no_grad():
        torch.testing.assert_close(ours(PICTURES), peer(PICTURES).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [(32, 32), (36, 28), (30, 22)])
def test_logits_of_transformers_swin(side, tmp_path):
    """At a size that windows tile in all stages, and at two that they do not."""
    zoo = pytest.importorskip("tfkit.zoo.windows")
    sizes = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    config = transformers.SwinConfig(**sizes, image_size=32, patch_size=2, num_labels=3)
    peer = shaken(transformers.SwinForImageClassification(config))
    ours = zoo.swin(8, (2, 2), (2, 4), window=4, patch=2, classes=3).eval()
    pretrained.load(ours, save(peer, tmp_path), "swin")
    pictures = torch.linspace(-9, 9, 2 * 3 * side[0] * side[1]).sin().view(2, 3, *side)
    with torch.no_grad():
        expected = peer(pictures, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(ours(pictures), expected, atol=1e-5, rtol=1e-5)


def tiny_deit(hidden: int):
    return pytest.importorskip("tfkit.zoo.data_efficient_vision").distilled(tiny_vit(hidden)).eval()


def test_logits_of_transformers_deit(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.DeiTConfig(**sizes, image_size=8, patch_size=4, num_labels=3, layer_norm_eps=1e-6)
    peer = shaken(transformers.DeiTForImageClassificationWithTeacher(config))
    ours = pretrained.load(tiny_deit(24), save(peer, tmp_path), "deit")
    with torch.no_grad():
        found, expected = ours.train()(PICTURES), peer(PICTURES)
        torch.testing.assert_close(found[:, 0], expected.cls_logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[:, 1], expected.distillation_logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.eval()(PICTURES), expected.logits, atol=1e-5, rtol=1e-5)


def test_timms_names_of_deit_give_the_same_weights_as_those_of_transformers(tmp_path):
    names = {"cls_token": (1, 1, 16), "dist_token": (1, 1, 16), "pos_embed": (1, 6, 16)}
    names |= pair("patch_embed.proj", 16, 3, 4, 4) | timm_block("blocks.0") | timm_block("blocks.1") | pair("norm", 16)
    state = numbered(names | pair("head", 3, 16) | pair("head_dist", 3, 16))
    torch.save({"model": state}, tmp_path / "deit.pth")
    ours = pretrained.load(tiny_deit(64), tmp_path / "deit.pth", "timm_deit")
    assert torch.equal(ours.head.by_teacher.weight, state["head_dist.weight"])
    assert torch.equal(ours.tokens[0].value, torch.cat([state["cls_token"], state["dist_token"]], 1)[0])
    assert torch.equal(ours.tokens[1].table, state["pos_embed"][0, :2])
    assert torch.equal(ours.stages[0].positions.table.flatten(0, 1), state["pos_embed"][0, 2:])


# What does not fit is named, and nothing is written.


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.pop("transformer.h.1.ln_1.bias"),
            "h.1.ln_1.bias is missing, of which stack.blocks.1.mix.norm.bias",
        ),
        (lambda s: s.update({"transformer.h.2.ln_1.bias": torch.zeros(16)}), "h.2.ln_1.bias is unknown"),
        (lambda s: s.update({"extra": torch.zeros(1)}), "extra is unknown"),
        (
            lambda s: s.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(48, 16)}),
            r"h.0.attn.c_attn.weight \(48, 16\): misshapen, stack.blocks.0.mix.part.to_qkv.weight is \(48, 16\)",
        ),
        (lambda s: s.update({"transformer.wpe.weight": torch.zeros(9, 16)}), r"wpe.weight \(9, 16\): misshapen"),
        (lambda s: s.update({"wte.weight": torch.zeros(40, 16)}), "wte.weight twice"),
        (lambda s: s.update({"lm_head.weight": torch.zeros(40, 16)}), "lm_head.weight differs from wte.weight"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(change, message, tmp_path):
    save(peer_gpt2(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    ours = gpt2(40, 16, 16, 2, 2)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        pretrained.load(ours, tmp_path, "gpt2")
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_every_fault_is_in_one_message(tmp_path):
    save(peer_gpt2(), tmp_path)
    with pytest.raises(ValueError) as error:
        pretrained.load(gpt2(40, 16, 24, 3, 2), tmp_path, "gpt2")
    text = str(error.value)
    assert "h.2.attn.c_attn.weight is missing" in text and "wte.weight (40, 16): misshapen" in text


def test_what_may_be_ignored(tmp_path):
    save(peer_gpt2(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state |= {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16), "score.weight": torch.ones(2, 16)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="score.weight is unknown") as error:
        pretrained.load(gpt2(40, 16, 16, 2, 2), tmp_path, "gpt2")
    assert "attn.bias" not in str(error.value)  # a mask, known to the layout
    pretrained.load(gpt2(40, 16, 16, 2, 2), tmp_path, "gpt2", ignore=("score.*",))


def test_tied_heads(tmp_path):
    """A file without its head gives the table to a model that has one; a head beside the table must be equal."""
    peer = peer_llama(tie_word_embeddings=True)
    save(peer, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    ours = pretrained.load(llama(40, 16, 2, 4, 24), tmp_path, "llama")
    assert torch.equal(ours.head.weight, ours.embed.table.weight)
    save(peer_gpt2(), tmp_path / "two")
    state = load_file(tmp_path / "two" / "model.safetensors")
    save_file(
        state | {"lm_head.weight": state["transformer.wte.weight"].clone()}, tmp_path / "two" / "model.safetensors"
    )
    pretrained.load(gpt2(40, 16, 16, 2, 2), tmp_path / "two", "gpt2")


def test_dtype_and_shared_storage_stay(tmp_path):
    peer = peer_llama()
    ours = llama(40, 16, 2, 4, 24).bfloat16()
    weight = ours.head.weight
    pretrained.load(ours, save(peer, tmp_path), "llama")
    assert ours.head.weight is weight and weight.dtype == torch.bfloat16
    assert torch.equal(weight, peer.lm_head.weight.bfloat16())


def test_files_that_are_no_checkpoint(tmp_path):
    ours = gpt2(40, 16, 16, 2, 2)
    with pytest.raises(FileNotFoundError, match=r"holds none of model.safetensors"):
        pretrained.load(ours, tmp_path, "gpt2")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        pretrained.load(ours, tmp_path / "no.bin", "gpt2")
    with pytest.raises(ValueError, match="no layout is called 'gpt3'; there are gpt2, llama"):
        pretrained.load(ours, tmp_path, "gpt3")
    torch.save({"step": 3}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match="step.pt holds no state dict"):
        pretrained.load(ours, tmp_path / "step.pt", "gpt2")
    with torch.device("meta"):
        empty = gpt2(40, 16, 16, 2, 2)
    with pytest.raises(ValueError, match="embed.table.weight of the model is on the meta device"):
        pretrained.load(empty, save(peer_gpt2(), tmp_path / "good"), "gpt2")


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"model": {"a": torch.nn.Linear(1, 1)}}, tmp_path / "bad.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        pretrained.read(tmp_path / "bad.bin")


@pytest.mark.parametrize(
    "where, message",
    [
        ({"a": "one.safetensors"}, "disagree on b in one.safetensors"),
        ({"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"}, "disagree on c in one.safetensors"),
        ({"a": "../one.safetensors"}, "outside its folder: ../one.safetensors"),
    ],
)
def test_an_index_that_lies(where, message, tmp_path):
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=message):
        pretrained.read(tmp_path)


# The language of the tables.


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(3, 4, 2))
        self.bias = nn.Parameter(torch.zeros(4))


def test_a_table_of_ones_own(tmp_path):
    """Braces join along the first axis, # counts and stacks, and old spellings are renamed."""
    layout = Layout("experts  e.#.{up,gate}.weight\nbias  {b,c}", rename={"gamma": "weight"}, ignore=("*.step",))
    file = {f"e.{i}.{part}.gamma": torch.randn(2, 2) for i in range(3) for part in ("up", "gate")}
    file |= {"b": torch.randn(3), "c": torch.randn(1), "e.0.step": torch.ones(())}
    save_file(file, tmp_path / "m.safetensors")
    ours = pretrained.load(Pair(), tmp_path / "m.safetensors", layout)
    for i in range(3):
        assert torch.equal(ours.experts[i, :2], file[f"e.{i}.up.gamma"])
        assert torch.equal(ours.experts[i, 2:], file[f"e.{i}.gate.gamma"])
    assert torch.equal(ours.bias, torch.cat([file["b"], file["c"]]))
    save_file(file | {"e.3.up.gamma": torch.ones(2, 2)}, tmp_path / "more.safetensors")  # a fourth, and only one half
    with pytest.raises(ValueError, match=r"e.3.up.weight \(2, 2\), .* misshapen, experts is \(3, 4, 2\)"):
        pretrained.load(Pair(), tmp_path / "more.safetensors", layout)
    with pytest.raises(ValueError, match="bias of the model has no rule in this layout"):
        pretrained.load(Pair(), tmp_path / "m.safetensors", Layout("experts  e.#.{up,gate}.weight", ignore=("*",)))
