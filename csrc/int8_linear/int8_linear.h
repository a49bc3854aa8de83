// A linear layer on 8-bit integers: arguments and entry point.
//
// Weights are quantised once, each output with a scale of its own. Inputs are quantised in each call, each row with a
// scale and a smallest value of its own:
//
//   weight[o][k] ~ scale[o] * w[o][k]                  w in [-127, 127]
//   x[r][k]      ~ low[r] + step[r] * q[r][k]          q in [0, 255]
//   y[r][o]      = scale[o] * step[r] * sum_k(q * w) + low[r] * total[o] + bias[o]
//
// where total[o] = scale[o] * sum_k(w[o][k]). The sum over k is exact, in 32-bit integers.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

namespace titok {

constexpr int kInt8Panel = 64;  // outputs whose weights lie together
constexpr int kInt8Group = 4;   // neighbouring inputs that one instruction multiplies
// With more inputs a sum of products of 255 and 127 could overflow.
constexpr int64_t kInt8MostInputs = 65536;

struct Int8LinearArgs {
  const void* x;         // (rows, inputs) dtype, contiguous
  const int8_t* weight;  // (panels, inputs / kInt8Group, kInt8Panel, kInt8Group): w, padded with 0
  const float* scale;    // (panels * kInt8Panel)
  const float* total;    // (panels * kInt8Panel)
  const void* bias;      // (outputs) dtype, or null
  void* out;             // (rows, outputs) dtype, output
  DType dtype;           // float32 or bfloat16
  int64_t rows;
  int64_t inputs;  // a multiple of kInt8Group
  int64_t outputs;
  bool gelu;  // y = gelu(y), the exact one
};

constexpr int64_t int8_panels(int64_t outputs) { return (outputs + kInt8Panel - 1) / kInt8Panel; }

// Rows of x after quantisation. The memory belongs to the caller.
struct Int8Rows {
  uint8_t* values;  // (rows, inputs): q
  float* low;       // (rows)
  float* step;      // (rows)
};

void launch_int8_linear(const Int8LinearArgs& args);

// The loops of one instruction set. Rows count from `first_row` of x and out, and from 0 in `Int8Rows`.
struct Int8LinearKernels {
  // Quantises rows [begin, end) of `rows`.
  void (*quantize)(const Int8LinearArgs& args, int64_t first_row, int64_t begin, int64_t end, const Int8Rows& rows);
  // Computes rows [begin, end) of the outputs of one panel.
  void (*multiply)(const Int8LinearArgs& args, int64_t first_row, int64_t begin, int64_t end, int64_t panel,
                   const Int8Rows& rows);
};
const Int8LinearKernels& int8_linear_kernels(Generic);
const Int8LinearKernels& int8_linear_kernels(Avx2);
const Int8LinearKernels& int8_linear_kernels(Avx512);
const Int8LinearKernels& int8_linear_kernels(Avx512Vnni);

}  // namespace titok
