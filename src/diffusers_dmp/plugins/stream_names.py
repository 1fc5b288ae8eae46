"""What Diffusers calls its lists of blocks and what flows through them, and in which order its blocks return it."""

# The names of lists of blocks, as Diffusers has them. Others, such as `noise_refiner`, prepare an input of these.
BLOCK_LISTS = (
    "transformer_blocks",
    "single_transformer_blocks",
    "blocks",
    "layers",
    "joint_transformer_blocks",
    "double_blocks",
    "double_stream_blocks",
    "single_stream_blocks",
    "visual_transformer_blocks",
    "temporal_transformer_blocks",
)
IMAGE_ARGUMENTS = ("hidden_states", "x", "visual_embed", "vis", "gen_seq")
OTHER_STREAMS = {
    "text": ("encoder_hidden_states", "und_seq"),
    "audio": ("audio_hidden_states", "aud"),
}
# Blocks that return a tuple, by class: the streams in the order of the tuple. The other blocks return the image's stream alone.
IMAGE_FIRST = ("image", "text")
TEXT_FIRST = ("text", "image")
STREAM_OUTPUTS: dict[str, tuple[str, ...]] = {
    "AuraFlowJointTransformerBlock": TEXT_FIRST,
    "BriaFiboTransformerBlock": TEXT_FIRST,
    "BriaSingleTransformerBlock": TEXT_FIRST,
    "BriaTransformerBlock": TEXT_FIRST,
    "ChromaTransformerBlock": TEXT_FIRST,
    "CogVideoXBlock": IMAGE_FIRST,
    "CogView3PlusTransformerBlock": IMAGE_FIRST,
    "CogView4TransformerBlock": IMAGE_FIRST,
    "ConsisIDBlock": IMAGE_FIRST,
    "Cosmos3VLTextMoTDecoderLayer": TEXT_FIRST,
    "EasyAnimateTransformerBlock": IMAGE_FIRST,
    "Flux2TransformerBlock": TEXT_FIRST,
    "Flux3SingleTransformerBlock": TEXT_FIRST,
    "FluxSingleTransformerBlock": TEXT_FIRST,
    "FluxTransformerBlock": TEXT_FIRST,
    "GlmImageTransformerBlock": IMAGE_FIRST,
    "HunyuanImageSingleTransformerBlock": IMAGE_FIRST,
    "HunyuanImageTransformerBlock": IMAGE_FIRST,
    "HunyuanVideo15TransformerBlock": IMAGE_FIRST,
    "HunyuanVideoSingleTransformerBlock": IMAGE_FIRST,
    "HunyuanVideoTokenReplaceSingleTransformerBlock": IMAGE_FIRST,
    "HunyuanVideoTokenReplaceTransformerBlock": IMAGE_FIRST,
    "HunyuanVideoTransformerBlock": IMAGE_FIRST,
    "JointTransformerBlock": TEXT_FIRST,
    "JoyImageEditPlusTransformerBlock": IMAGE_FIRST,
    "JoyImageTransformerBlock": IMAGE_FIRST,
    "Kandinsky6FusedTransformerDecoderBlock": ("image", "audio"),
    "LTX2VideoTransformerBlock": ("image", "audio"),
    "LongCatImageSingleTransformerBlock": TEXT_FIRST,
    "LongCatImageTransformerBlock": TEXT_FIRST,
    "MochiTransformerBlock": IMAGE_FIRST,
    "MotifVideoSingleTransformerBlock": IMAGE_FIRST,
    "MotifVideoTransformerBlock": IMAGE_FIRST,
    "OvisImageSingleTransformerBlock": TEXT_FIRST,
    "OvisImageTransformerBlock": TEXT_FIRST,
    "QwenImageTransformerBlock": TEXT_FIRST,
}
