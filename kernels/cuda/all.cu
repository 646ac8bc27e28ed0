// Every kernel in one module, as the build script compiles it.
#include "attention.cu"
#include "lora.cu"
#include "matmul.cu"
#include "rows.cu"
