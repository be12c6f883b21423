"""Files of equal score: Taut's beside NNCodec, ONNX Runtime's quantizer and float16 in safetensors.

LeNet-5 on MNIST. NNCodec (Becking and others, ICML 2023 workshop; ISO/IEC 15938-17) quantizes and
codes a network as it is, at one of many steps; so does Taut here, by a recipe without recovery, and
with one. NNCodec wants another numpy than Taut: it runs in a Python of its own,

    python -m venv nncodec && nncodec/bin/pip install nncodec
    TAUT_NNCODEC=nncodec/bin/python python benchmarks/peers.py --only size

and where there is none its row says so, and the figure published for it stands beside.
"""
