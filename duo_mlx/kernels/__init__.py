"""Metal kernels for decoding that read a token's route on the device.

``*.metal`` holds their source, `launch` runs them, `fused` is what a layer calls. Tests run the very source in an
emulator (tests/kernels); `selfcheck` compares them with MLX's own products on the machine at hand before they are used.
"""
