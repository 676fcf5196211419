"""What people know from PEFT and transformers and fedpers refuses, each with the reason. Tested in test_backbone.py."""

_EMBEDDING = (
    "an embedding; PEFT's factors of one are bare parameters, not layers, so no record has a gradient of its own to "
    "clip, and it lies below all blocks, where everything is frozen and computed once"
)
_POSITIONS = (
    "a table of positions that is read once for all records of a batch, so no record has a gradient of its own to clip"
)
REFUSED = {  # keys under `model`, and names of layers in model.adapter.targets
    "use_dora": "DoRA takes the norm of a whole weight by sending an identity matrix through its factors; its rows are "
    "no records and have no owner, so there is neither a weight for each client nor a gradient for each record",
    "modules_to_save": "a module trained whole belongs to no parameter group, so nothing says whether it is shared or "
    "personal and how it is clipped; the task brings its own head, and some methods train layer norms",
    "lora_dropout": "every dropout is 0; what an active one draws would hang on how cohorts and batches are cut, and "
    "on where a stopped run is resumed",
    "bias": "biases belong to no parameter group and stay frozen; what each client has its own weights of are linear "
    "layers without bias",
    "gradient_checkpointing": "a block is run again in the backward pass, which Opacus counts as one more use of each "
    "of its layers, and then no record gets a gradient; for less memory lower engine.token_budget",
    **dict.fromkeys(("word_embeddings", "wte", "embed_tokens"), _EMBEDDING),
    **dict.fromkeys(("position_embeddings", "wpe"), _POSITIONS),
    "lm_head": "the output embeddings are the input embeddings (tied); trained, one weight would get gradients from "
    "both places, so they stay frozen, and the task's head shifts the states that meet them",
}
