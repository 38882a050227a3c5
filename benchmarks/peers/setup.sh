#!/bin/sh
# The peers' environments under FOLDER, one each, since their packages contradict each other:
#     benchmarks/peers/setup.sh FOLDER [PYTHON [CAP]]
# CAP avx2 adds a llama.cpp that is compiled for AVX2 alone, for `python -m benchmarks.peers --cap avx2`.
# llama-cpp-python is compiled for this machine's processor, which takes a quarter of an hour on two cores;
# it wants a C++ compiler.
# A peer that cannot be installed leaves the others be: the comparison records it as failed.
set -u
folder=$1
python=${2:-python3}
cap=${3:-}

# environment, then what is installed into it
environment() {
    name=$1
    shift
    test -e "$folder/$name/.installed" && return
    "$python" -m venv "$folder/$name" &&
        "$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@" &&
        touch "$folder/$name/.installed" || echo "$0: $name could not be installed" >&2
}

# torch and torchvision are named, so that nothing brings later ones with libraries for GPUs; a torchvision that was
# compiled for another torch cannot be imported, and text needs none
environment openvino torch==2.13.0 torchvision==0.28.0 optimum-intel==2.2.0 openvino==2026.4.1 nncf==3.4.0
"$folder/openvino/bin/python" -m pip uninstall --quiet --yes torchvision
environment onnxruntime torch==2.13.0 transformers==5.17.0 onnxruntime-genai==0.18.0 onnxruntime==1.32.0 \
    onnx==1.23.2 onnx-ir==1.1.0
# without pip's cache: a wheel in it may have been compiled for another instruction set
llama_cpp() {
    name=$1
    shift
    CMAKE_ARGS="$*" environment "$name" --no-cache-dir llama-cpp-python==0.3.36 gguf==0.19.0 \
        --no-binary llama-cpp-python
}

llama_cpp llama-cpp -DGGML_NATIVE=ON
if test "$cap" = avx2; then
    llama_cpp llama-cpp-avx2 -DGGML_NATIVE=OFF -DGGML_AVX512=OFF -DGGML_AVX_VNNI=OFF \
        -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
fi
