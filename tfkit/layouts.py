"""The names of published checkpoints, one table each, for `tfkit.pretrained`, which says how a table is read.

Where names are transformers' and timm's alike, the table is called after the model; `timm_` marks timm's own (for
CaiT and DeiT also those of the authors' release).
"""

from __future__ import annotations

import re

_DECODER = {"prefix": "model.", "tied": {"lm_head.weight": "embed_tokens.weight"}, "ignore": ("*.rotary_emb.inv_freq",)}
_LLAMA = """
embed.table.weight                            embed_tokens.weight
stack.blocks.*.mix.norm.weight                layers.*.input_layernorm.weight
stack.blocks.*.mix.part.to_qkv.weight         layers.*.self_attn.{q,k,v}_proj.weight
stack.blocks.*.mix.part.to_out.weight         layers.*.self_attn.o_proj.weight
stack.blocks.*.feed.norm.weight               layers.*.post_attention_layernorm.weight
stack.norm.weight                             norm.weight
head.weight                                   lm_head.weight
"""
_LLAMA_FEED = """
stack.blocks.*.feed.part.*.weight             layers.*.mlp.*_proj.weight
"""
_MIXTRAL_FEED = """
stack.blocks.*.feed.part.router.score.weight  layers.*.block_sparse_moe.gate.weight
stack.blocks.*.feed.part.experts.gate_up      layers.*.block_sparse_moe.experts.#.{w1,w3}.weight
stack.blocks.*.feed.part.experts.down         layers.*.block_sparse_moe.experts.#.w2.weight
"""
_GPT2 = """
embed.table.weight                            wte.weight
embed.positions.table                         wpe.weight
stack.blocks.*.mix.norm.*                     h.*.ln_1.*
stack.blocks.*.mix.part.to_qkv.*              h.*.attn.c_attn.*          transposed
stack.blocks.*.mix.part.to_out.*              h.*.attn.c_proj.*          transposed
stack.blocks.*.feed.norm.*                    h.*.ln_2.*
stack.blocks.*.feed.part.up.*                 h.*.mlp.c_fc.*             transposed
stack.blocks.*.feed.part.down.*               h.*.mlp.c_proj.*           transposed
stack.norm.*                                  ln_f.*
head.weight                                   lm_head.weight
"""
_TIMM_CAIT = """
token                                         cls_token
embed.place                                   pos_embed
embed.cut.*                                   patch_embed.proj.*
stack.blocks.*.mix.norm.*                     blocks.*.norm1.*
stack.blocks.*.mix.part.to_qkv.*              blocks.*.attn.qkv.*
stack.blocks.*.mix.part.attend.before.*       blocks.*.attn.proj_l.*
stack.blocks.*.mix.part.attend.after.*        blocks.*.attn.proj_w.*
stack.blocks.*.mix.part.to_out.*              blocks.*.attn.proj.*
stack.blocks.*.mix.scale                      blocks.*.gamma_1
stack.blocks.*.feed.norm.*                    blocks.*.norm2.*
stack.blocks.*.feed.part.up.*                 blocks.*.mlp.fc1.*
stack.blocks.*.feed.part.down.*               blocks.*.mlp.fc2.*
stack.blocks.*.feed.scale                     blocks.*.gamma_2
class_blocks.*.norm.*                         blocks_token_only.*.norm1.*
class_blocks.*.look.to_q.*                    blocks_token_only.*.attn.q.*
class_blocks.*.look.to_kv.*                   blocks_token_only.*.attn.{k,v}.*
class_blocks.*.look.to_out.*                  blocks_token_only.*.attn.proj.*
class_blocks.*.scale                          blocks_token_only.*.gamma_1
class_blocks.*.feed.norm.*                    blocks_token_only.*.norm2.*
class_blocks.*.feed.part.up.*                 blocks_token_only.*.mlp.fc1.*
class_blocks.*.feed.part.down.*               blocks_token_only.*.mlp.fc2.*
class_blocks.*.feed.scale                     blocks_token_only.*.gamma_2
norm.*                                        norm.*
head.*                                        head.*
"""
_T5 = """
embed_source.table.weight                     shared.weight
embed_target.table.weight                     shared.weight
head.table.weight                             shared.weight
encoder.blocks.*.mix.part.attend.table        encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
encoder.blocks.*.mix.norm.weight              encoder.block.*.layer.0.layer_norm.weight
encoder.blocks.*.mix.part.to_qkv.weight       encoder.block.*.layer.0.SelfAttention.{q,k,v}.weight
encoder.blocks.*.mix.part.to_out.weight       encoder.block.*.layer.0.SelfAttention.o.weight
encoder.blocks.*.feed.norm.weight             encoder.block.*.layer.1.layer_norm.weight
encoder.blocks.*.feed.part.up.weight          encoder.block.*.layer.1.DenseReluDense.wi.weight
encoder.blocks.*.feed.part.down.weight        encoder.block.*.layer.1.DenseReluDense.wo.weight
decoder.blocks.*.mix.part.attend.table        decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
decoder.blocks.*.mix.norm.weight              decoder.block.*.layer.0.layer_norm.weight
decoder.blocks.*.mix.part.to_qkv.weight       decoder.block.*.layer.0.SelfAttention.{q,k,v}.weight
decoder.blocks.*.mix.part.to_out.weight       decoder.block.*.layer.0.SelfAttention.o.weight
decoder.blocks.*.look.norm.weight             decoder.block.*.layer.1.layer_norm.weight
decoder.blocks.*.look.part.to_q.weight        decoder.block.*.layer.1.EncDecAttention.q.weight
decoder.blocks.*.look.part.to_kv.weight       decoder.block.*.layer.1.EncDecAttention.{k,v}.weight
decoder.blocks.*.look.part.to_out.weight      decoder.block.*.layer.1.EncDecAttention.o.weight
decoder.blocks.*.feed.norm.weight             decoder.block.*.layer.2.layer_norm.weight
decoder.blocks.*.feed.part.up.weight          decoder.block.*.layer.2.DenseReluDense.wi.weight
decoder.blocks.*.feed.part.down.weight        decoder.block.*.layer.2.DenseReluDense.wo.weight
*.norm.weight                                 *.final_layer_norm.weight
"""
_BERT = """
embed.table.weight                            embeddings.word_embeddings.weight
embed.places.weight                           embeddings.position_embeddings.weight
embed.kinds.weight                            embeddings.token_type_embeddings.weight
embed.norm.*                                  embeddings.LayerNorm.*
stack.blocks.*.mix.part.to_qkv.*              encoder.layer.*.attention.self.{query,key,value}.*
stack.blocks.*.mix.part.to_out.*              encoder.layer.*.attention.output.dense.*
stack.blocks.*.mix.norm.*                     encoder.layer.*.attention.output.LayerNorm.*
stack.blocks.*.feed.part.up.*                 encoder.layer.*.intermediate.dense.*
stack.blocks.*.feed.part.down.*               encoder.layer.*.output.dense.*
stack.blocks.*.feed.norm.*                    encoder.layer.*.output.LayerNorm.*
pool.*                                        pooler.dense.*
"""
_BERT_HEAD = """
change.*                                      cls.predictions.transform.dense.*
norm.*                                        cls.predictions.transform.LayerNorm.*
bias                                          cls.predictions.bias
"""
_BERT_FILE = {
    "prefix": "bert.",
    "ignore": ("embeddings.position_ids",),
    "rename": {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},  # in files of 2018
}
_VIT = """
stem.cut.*                                    embeddings.patch_embeddings.projection.*
tokens.0.value                                embeddings.cls_token                            squeezed
tokens.1.table                                embeddings.position_embeddings                  class_place
stages.0.positions.table                      embeddings.position_embeddings                  grid_places
stages.0.blocks.*.mix.norm.*                  encoder.layer.*.layernorm_before.*
stages.0.blocks.*.mix.part.to_qkv.*           encoder.layer.*.attention.attention.{query,key,value}.*
stages.0.blocks.*.mix.part.to_out.*           encoder.layer.*.attention.output.dense.*
stages.0.blocks.*.feed.norm.*                 encoder.layer.*.layernorm_after.*
stages.0.blocks.*.feed.part.up.*              encoder.layer.*.intermediate.dense.*
stages.0.blocks.*.feed.part.down.*            encoder.layer.*.output.dense.*
norm.*                                        layernorm.*
head.*                                        classifier.*
"""
_TIMM_VIT = """
stem.cut.*                                    patch_embed.proj.*
tokens.0.value                                cls_token                                       squeezed
tokens.1.table                                pos_embed                                       class_place
stages.0.positions.table                      pos_embed                                       grid_places
stages.0.blocks.*.mix.norm.*                  blocks.*.norm1.*
stages.0.blocks.*.mix.part.to_qkv.*           blocks.*.attn.qkv.*
stages.0.blocks.*.mix.part.to_out.*           blocks.*.attn.proj.*
stages.0.blocks.*.feed.norm.*                 blocks.*.norm2.*
stages.0.blocks.*.feed.part.up.*              blocks.*.mlp.fc1.*
stages.0.blocks.*.feed.part.down.*            blocks.*.mlp.fc2.*
norm.*                                        norm.*
head.*                                        head.*
"""
_TIMM_CONVMIXER = """
stem.cut.*                                    stem.0.*
stem.norm.1.layer.*                           stem.2.*
stages.0.blocks.*.places.0.*                  blocks.*.0.fn.0.*
stages.0.blocks.*.places.2.*                  blocks.*.0.fn.2.*
stages.0.blocks.*.features.0.*                blocks.*.1.*
stages.0.blocks.*.features.2.*                blocks.*.3.*
head.*                                        head.*
"""
_TIMM_TNT = """
stem.look.*                                   pixel_embed.proj.*
stem.places                                   pixel_pos                                       squeezed
tokens.0.value                                cls_token                                       squeezed
tokens.1.table                                patch_pos                                       class_place
stages.0.positions.table                      patch_pos                                       grid_places
stages.0.first.0.*                            norm1_proj.*
stages.0.first.1.*                            proj.*
stages.0.first.2.*                            norm2_proj.*
stages.0.blocks.*.inner.mix.norm.*            blocks.*.norm_in.*
stages.0.blocks.*.inner.mix.part.to_qkv.*     blocks.*.attn_in.{qk,v}.*
stages.0.blocks.*.inner.mix.part.to_out.*     blocks.*.attn_in.proj.*
stages.0.blocks.*.inner.feed.norm.*           blocks.*.norm_mlp_in.*
stages.0.blocks.*.inner.feed.part.up.*        blocks.*.mlp_in.fc1.*
stages.0.blocks.*.inner.feed.part.down.*      blocks.*.mlp_in.fc2.*
stages.0.blocks.*.join.0.*                    blocks.*.norm1_proj.*
stages.0.blocks.*.join.1.*                    blocks.*.proj.*
stages.0.blocks.*.join.2.*                    blocks.*.norm2_proj.*
stages.0.blocks.*.outer.mix.norm.*            blocks.*.norm_out.*
stages.0.blocks.*.outer.mix.part.to_qkv.*     blocks.*.attn_out.{qk,v}.*
stages.0.blocks.*.outer.mix.part.to_out.*     blocks.*.attn_out.proj.*
stages.0.blocks.*.outer.feed.norm.*           blocks.*.norm_mlp.*
stages.0.blocks.*.outer.feed.part.up.*        blocks.*.mlp.fc1.*
stages.0.blocks.*.outer.feed.part.down.*      blocks.*.mlp.fc2.*
norm.*                                        norm.*
head.*                                        head.*
"""
_T2T_SHARED = """
stem.project.*                                tokens_to_token.project.*
tokens.0.value                                cls_token                                       squeezed
stages.0.blocks.*.mix.norm.*                  blocks.*.norm1.*
stages.0.blocks.*.mix.part.to_qkv.*           blocks.*.attn.qkv.*
stages.0.blocks.*.mix.part.to_out.*           blocks.*.attn.proj.*
stages.0.blocks.*.feed.norm.*                 blocks.*.norm2.*
stages.0.blocks.*.feed.part.up.*              blocks.*.mlp.fc1.*
stages.0.blocks.*.feed.part.down.*            blocks.*.mlp.fc2.*
norm.*                                        norm.*
head.*                                        head.*
"""


def _t2t(rules: str) -> dict:
    """The authors' T2T-ViT: `rules` for each of the two layers between splits, @ ours and # theirs."""
    layers = [rules.replace("@", f"stem.between.{i}").replace("#", f"tokens_to_token.attention{i + 1}") for i in (0, 1)]
    return {"table": _T2T_SHARED + "".join(layers), "prefix": "module.", "ignore": ("pos_embed",)}


_T2T_SOFTMAX = """
@.norm.* #.norm1.*
@.to_qkv.* #.attn.qkv.*
@.to_out.* #.attn.proj.*
@.feed.norm.* #.norm2.*
@.feed.part.up.* #.mlp.fc1.*
@.feed.part.down.* #.mlp.fc2.*
"""
_T2T_PERFORMER = """
@.norm.* #.norm1.*
@.to_qkv.* #.kqv.* query_first
@.attend.w #.w
@.to_out.* #.proj.*
@.feed.norm.* #.norm2.*
@.feed.part.up.* #.mlp.0.*
@.feed.part.down.* #.mlp.2.*
"""

_SWIN = """
stem.cut.*                                    embeddings.patch_embeddings.projection.*
stem.norm.*                                   embeddings.norm.*
stages.*.blocks.*.mix.norm.*                  encoder.layers.*.blocks.*.layernorm_before.*
stages.*.blocks.*.mix.part.attention.to_qkv.* encoder.layers.*.blocks.*.attention.self.{query,key,value}.*
stages.*.blocks.*.mix.part.attention.to_out.* encoder.layers.*.blocks.*.attention.output.dense.*
stages.*.blocks.*.mix.part.bias.table         encoder.layers.*.blocks.*.attention.self.relative_position_bias_table
stages.*.blocks.*.feed.norm.*                 encoder.layers.*.blocks.*.layernorm_after.*
stages.*.blocks.*.feed.part.up.*              encoder.layers.*.blocks.*.intermediate.dense.*
stages.*.blocks.*.feed.part.down.*            encoder.layers.*.blocks.*.output.dense.*
stages.1.down.norm.*                          encoder.layers.0.downsample.norm.*
stages.1.down.reduce.*                        encoder.layers.0.downsample.reduction.*
stages.2.down.norm.*                          encoder.layers.1.downsample.norm.*
stages.2.down.reduce.*                        encoder.layers.1.downsample.reduction.*
stages.3.down.norm.*                          encoder.layers.2.downsample.norm.*
stages.3.down.reduce.*                        encoder.layers.2.downsample.reduction.*
norm.*                                        layernorm.*
head.*                                        classifier.*
"""


def _two_tokens(table: str, tokens: str, head: str, taught_head: str) -> str:
    """The table of a ViT as that of a distilled DeiT: two tokens, their two positions, two heads."""
    lines = [line for line in table.strip().splitlines() if not line.startswith("head.")]
    changed = [
        re.sub(r"\S+ +squeezed", f"{tokens}  squeezed", line).replace("class_place", "token_places") for line in lines
    ]
    changed = [line.replace("grid_places", "grid_places_after_two") for line in changed]
    return "\n".join([*changed, f"head.by_class.* {head}.*", f"head.by_teacher.* {taught_head}.*"])


# name -> the arguments of `tfkit.pretrained.Layout`
TABLES: dict[str, dict] = {
    "gpt2": {
        "table": _GPT2,
        "prefix": "transformer.",
        "tied": {"lm_head.weight": "wte.weight"},
        "ignore": ("h.*.attn.bias", "h.*.attn.masked_bias"),
    },
    "llama": {"table": _LLAMA + _LLAMA_FEED, **_DECODER},
    "mixtral": {"table": _LLAMA + _MIXTRAL_FEED, **_DECODER},
    "bert": {"table": _BERT, **_BERT_FILE},  # a file with heads needs ignore=("cls.*",)
    "bert_masked": {
        "table": re.sub(r"(?m)^(?=\w)", "bert.", _BERT) + _BERT_HEAD,
        "tied": {
            "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        **_BERT_FILE,
    },
    "t5": {
        "table": _T5,
        "tied": dict.fromkeys(
            ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight"
        ),
        "ignore": ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),  # in old files, unused
    },
    "vit": {"table": _VIT, "prefix": "vit."},
    "swin": {"table": _SWIN, "prefix": "swin.", "ignore": ("*.relative_position_index",)},
    "timm_vit": {"table": _TIMM_VIT, "prefix": "module."},  # DeiT without distillation, too
    "deit": {
        "table": _two_tokens(_VIT, "embeddings.{cls,distillation}_token", "cls_classifier", "distillation_classifier"),
        "prefix": "deit.",
    },
    "timm_deit": {"table": _two_tokens(_TIMM_VIT, "{cls,dist}_token", "head", "head_dist"), "prefix": "module."},
    "timm_cait": {"table": _TIMM_CAIT, "prefix": "module."},
    "timm_convmixer": {"table": _TIMM_CONVMIXER},
    "timm_tnt": {"table": _TIMM_TNT, "prefix": "module."},
    "t2t": _t2t(_T2T_PERFORMER),  # the authors' release; its backbone divides scores by the root of the whole width
    "t2t_softmax": _t2t(_T2T_SOFTMAX),
}
