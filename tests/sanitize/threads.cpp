// Runs every kernel of csrc/ with several threads, and from several threads at once, and compares the results bit for
// bit with those of one thread. Built with ThreadSanitizer, over openmp.cpp.
#include <omp.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "add_layer_norm/add_layer_norm.h"
#include "common/threads.h"
#include "group_norm_silu/group_norm_silu.h"
#include "int8_linear/int8_linear.h"
#include "masked_attention/masked_attention.h"
#include "masked_decode/masked_decode.h"
#include "maskgit_decode/maskgit_decode.h"
#include "nearest_codebook/nearest_codebook.h"

using namespace titok;

namespace {

// Memory of a tensor, aligned to a cache line as PyTorch's is.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(bytes), block_(allocate_aligned(bytes)) {
    std::memset(block_.get(), 0xA5, bytes);
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(block_.get());
  }
  bool operator==(const Buffer& other) const {
    return bytes_ == other.bytes_ && !std::memcmp(block_.get(), other.block_.get(), bytes_);
  }

 private:
  int64_t bytes_;
  AlignedBuffer block_;
};

// Values of the normal distribution; repeated after 8191 of them, because drawing takes long under ThreadSanitizer.
Buffer normal(int64_t count, DType dtype, unsigned seed) {
  constexpr int64_t kDrawn = 8191;
  Buffer buffer(count * bytes_of(dtype));
  std::mt19937 random(seed);
  std::normal_distribution<float> values;
  for (int64_t i = 0; i < std::min(count, kDrawn); ++i) {
    const float value = values(random);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == DType::kFloat32)
      buffer.as<float>()[i] = value;
    else
      buffer.as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
  }
  const int64_t size = bytes_of(dtype);
  for (int64_t i = kDrawn; i < count; i += kDrawn)
    std::memcpy(buffer.as<char>() + i * size, buffer.as<char>(), std::min(count - i, kDrawn) * size);
  return buffer;
}

using Outputs = std::vector<Buffer>;
struct Case {
  std::string name;
  std::function<Outputs()> run;
  std::vector<int> threads = {2, 3, 5};  // numbers of threads that are compared with one
};

Case layer_norm(int64_t rows, int64_t width, DType dtype, bool add) {
  return {"add_layer_norm", [=] {
            const int64_t count = rows * width;
            const Buffer x = normal(count, dtype, 1), residual = normal(count, DType::kFloat32, 2);
            const Buffer weight = normal(width, DType::kFloat32, 3), bias = normal(width, DType::kFloat32, 4);
            Outputs out;
            out.emplace_back(count * 4);
            out.emplace_back(count * bytes_of(dtype));
            AddLayerNormArgs args{};
            args.x = x.as<void>();
            args.residual = add ? residual.as<void>() : nullptr;
            args.total = add ? out[0].as<void>() : nullptr;
            args.normalised = out[1].as<void>();
            args.weight = weight.as<void>();
            args.bias = bias.as<void>();
            args.x_dtype = args.normalised_dtype = dtype;
            args.residual_dtype = args.weight_dtype = DType::kFloat32;
            args.rows = rows;
            args.width = width;
            args.eps = 1e-5f;
            launch_add_layer_norm(args);
            return out;
          }};
}

Case int8_linear(int64_t rows, int64_t inputs, int64_t outputs, DType dtype) {
  return {"int8_linear", [=] {
            const int64_t padded = int8_panels(outputs) * kInt8Panel;
            const Buffer x = normal(rows * inputs, dtype, 1), bias = normal(outputs, dtype, 2);
            const Buffer scale = normal(padded, DType::kFloat32, 3), total = normal(padded, DType::kFloat32, 4);
            const Buffer weight = normal(padded * inputs / 4, DType::kFloat32, 5);  // any bytes
            Outputs out;
            out.emplace_back(rows * outputs * bytes_of(dtype));
            Int8LinearArgs args{};
            args.x = x.as<void>();
            args.weight = weight.as<int8_t>();
            args.scale = scale.as<float>();
            args.total = total.as<float>();
            args.bias = bias.as<void>();
            args.out = out[0].as<void>();
            args.dtype = dtype;
            args.rows = rows;
            args.inputs = inputs;
            args.outputs = outputs;
            args.gelu = true;
            launch_int8_linear(args);
            return out;
          }};
}

Case layer_norm_backward(int64_t rows, int64_t width, DType dtype) {
  return {"add_layer_norm_backward", [=] {
            const int64_t count = rows * width;
            const Buffer total = normal(count, dtype, 1), grad_total = normal(count, dtype, 2);
            const Buffer grad_normalised = normal(count, dtype, 3), weight = normal(width, DType::kFloat32, 4);
            Outputs out;
            out.emplace_back(count * bytes_of(dtype));
            out.emplace_back(add_layer_norm_chunks(rows) * 2 * width * 4);
            AddLayerNormBackwardArgs args{};
            args.grad_total = grad_total.as<void>();
            args.grad_normalised = grad_normalised.as<void>();
            args.total = total.as<void>();
            args.grad = out[0].as<void>();
            args.weight = weight.as<void>();
            args.partial = out[1].as<float>();
            args.normalised_dtype = args.total_dtype = dtype;
            args.weight_dtype = DType::kFloat32;
            args.rows = rows;
            args.width = width;
            args.eps = 1e-5f;
            launch_add_layer_norm_backward(args);
            return out;
          }};
}

Case group_norm(int64_t batch, int64_t pixels, int64_t channels, DType dtype, bool add) {
  return {"group_norm_silu", [=] {
            const int64_t count = batch * pixels * channels, groups = 4;
            const Buffer x = normal(count, dtype, 1), residual = normal(count, dtype, 2);
            const Buffer weight = normal(channels, dtype, 3), bias = normal(channels, dtype, 4);
            Outputs out;
            for (int i = 0; i < 2; ++i) out.emplace_back(count * bytes_of(dtype));
            for (int i = 0; i < 2; ++i) out.emplace_back(batch * groups * 4);
            GroupNormSiluArgs args{};
            args.x = x.as<void>();
            args.residual = add ? residual.as<void>() : nullptr;
            args.total = add ? out[0].as<void>() : nullptr;
            args.normalised = out[1].as<void>();
            args.weight = weight.as<void>();
            args.bias = bias.as<void>();
            args.mean = out[2].as<float>();
            args.rstd = out[3].as<float>();
            args.map_dtype = args.normalised_dtype = args.parameter_dtype = dtype;
            args.batch = batch;
            args.pixels = pixels;
            args.channels = channels;
            args.groups = groups;
            args.eps = 1e-6;
            launch_group_norm_silu(args);
            return out;
          }};
}

Case group_norm_backward(int64_t batch, int64_t pixels, int64_t channels, DType dtype, bool add) {
  return {"group_norm_silu_backward", [=] {
            const int64_t count = batch * pixels * channels, groups = 4;
            const Buffer x = normal(count, dtype, 1), grad = normal(count, dtype, 2);
            const Buffer grad_total = normal(count, dtype, 3);
            const Buffer weight = normal(channels, dtype, 4), bias = normal(channels, dtype, 5);
            const Buffer statistics = normal(batch * groups, DType::kFloat32, 6);
            Outputs out;
            out.emplace_back(count * bytes_of(dtype));
            for (int i = 0; i < 2; ++i) out.emplace_back(channels * 4);
            GroupNormSiluBackwardArgs args{};
            args.grad = grad.as<void>();
            args.grad_total = add ? grad_total.as<void>() : nullptr;
            args.x = x.as<void>();
            args.weight = weight.as<void>();
            args.bias = bias.as<void>();
            args.mean = args.rstd = statistics.as<float>();
            args.grad_x = out[0].as<void>();
            args.grad_weight = out[1].as<float>();
            args.grad_bias = out[2].as<float>();
            args.map_dtype = args.grad_dtype = args.parameter_dtype = dtype;
            args.batch = batch;
            args.pixels = pixels;
            args.channels = channels;
            args.groups = groups;
            launch_group_norm_silu_backward(args);
            return out;
          }};
}

Case attention(int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim, DType dtype, bool backward) {
  return {backward ? "masked_attention_backward" : "masked_attention", [=] {
            const int64_t width = heads * head_dim, count = batch * tokens * width;
            const Buffer qkv = normal(3 * count, dtype, 1), grad = normal(count, dtype, 2);
            Buffer mask(batch * tokens);
            for (int64_t i = 0; i < batch * tokens; ++i) mask.as<uint8_t>()[i] = i % 3 != 0;
            Outputs out;
            out.emplace_back(count * bytes_of(dtype));
            out.emplace_back(batch * heads * tokens * 4);
            out.emplace_back(3 * count * bytes_of(dtype));
            MaskedAttentionArgs args{};
            args.qkv = qkv.as<void>();
            args.batch_stride = tokens * 3 * width;
            args.token_stride = 3 * width;
            args.key_mask = mask.as<uint8_t>();
            args.out = out[0].as<void>();
            args.lse = out[1].as<float>();
            args.dtype = dtype;
            args.batch = batch;
            args.tokens = tokens;
            args.heads = heads;
            args.head_dim = head_dim;
            args.queries = tokens;
            args.scale = 0.2f;
            launch_masked_attention(args);
            if (!backward) return out;
            args.grad = grad.as<void>();
            args.grad_batch_stride = tokens * width;
            args.grad_token_stride = width;
            args.dqkv = out[2].as<void>();
            launch_masked_attention_backward(args);
            return out;
          }};
}

Case nearest(int64_t rows, int64_t codes, int width, bool normalize) {
  return {"nearest_codebook", [=] {
            const Buffer latents = normal(rows * width, DType::kFloat32, 1);
            const Buffer codebook = normal(codes * width, DType::kFloat32, 2);
            Outputs out;
            out.emplace_back(rows * 8);
            NearestCodebookArgs args{};
            args.latents = {latents.as<void>(), DType::kFloat32, rows, width};
            args.codebook = {codebook.as<void>(), DType::kFloat32, codes, width};
            args.width = width;
            args.normalize = normalize;
            args.out = out[0].as<int64_t>();
            launch_nearest_codebook(args);
            return out;
          }};
}

Case decode(int batch, int length, int codes, DType dtype, bool maskgit) {
  return {"maskgit_decode_step", [=] {
            const int64_t count = int64_t{batch} * length;
            const Buffer cond = normal(count * codes, dtype, 1), uncond = normal(count * codes, dtype, 2);
            Buffer tokens(count * 8);
            for (int64_t i = 0; i < count; ++i) tokens.as<int64_t>()[i] = i % 5 == 0 ? i % codes : codes;
            Outputs out;
            out.emplace_back(count * 8);
            out.emplace_back(count * 4);
            DecodeArgs args{};
            args.tokens = tokens.as<int64_t>();
            args.cond = cond.as<void>();
            args.uncond = uncond.as<void>();
            args.cond_stride_b = args.uncond_stride_b = int64_t{length} * codes;
            args.cond_stride_n = args.uncond_stride_n = codes;
            args.mask_token = codes;
            args.batch = batch;
            args.length = length;
            args.codes = codes;
            args.dtype = dtype;
            args.maskgit = maskgit;
            args.out = out[0].as<int64_t>();
            args.confidence = out[1].as<float>();
            args.params = {7, 3, 2, length / 2, 2.5f, 1.0f, 1.0f, 1.0f};
            launch_maskgit_decode(args, omp_get_max_threads());
            return out;
          }};
}

// Rows of every kind: greedy, drawn and truncated; candidates and positions that may be edited.
MaskedDecodeArgs masked_decode_args(int batch, int length, int codes, DType dtype, const Buffer& logits,
                                    const Buffer& integers, const Buffer& floats) {
  for (int b = 0; b < batch; ++b) {
    integers.as<RowIntegers>()[b] = {7, b, 3, length / 4, b % 2 ? 50 : 0, b % 3 ? kTopPOne : kTopPOne / 2, 1, length};
    floats.as<RowFloats>()[b] = {1.0f, 1.5f, b % 2 ? 1.25f : 0.0f, 0.5f, 0.75f, -1.0f};
  }
  MaskedDecodeArgs args{};
  args.cond = logits.as<void>();
  args.integers = integers.as<RowIntegers>();
  args.floats = floats.as<RowFloats>();
  args.cond_stride_b = int64_t{length} * codes;
  args.cond_stride_n = codes;
  args.batch = batch;
  args.length = length;
  args.codes = codes;
  args.dtype = dtype;
  return args;
}

Case masked_decode(int batch, int length, int codes, DType dtype, Policy policy, Confidence confidence) {
  return {"masked_decode_step", [=] {
            const int64_t count = int64_t{batch} * length;
            const Buffer logits = normal(count * codes, dtype, 1);
            const Buffer integers(batch * sizeof(RowIntegers)), floats(batch * sizeof(RowFloats));
            Buffer tokens(count * 8), steps(count * 4);
            for (int64_t i = 0; i < count; ++i) tokens.as<int64_t>()[i] = i % 5 == 0 ? i % codes : codes;
            Outputs out;
            for (const int64_t bytes : {8, 4, 4, 4}) out.emplace_back(count * bytes);
            MaskedDecodeArgs args = masked_decode_args(batch, length, codes, dtype, logits, integers, floats);
            args.tokens = tokens.as<int64_t>();
            args.step_map = steps.as<int32_t>();
            args.mask_token = codes;
            args.policy = policy;
            args.confidence = confidence;
            args.edits = args.renoise = true;
            args.out = out[0].as<int64_t>();
            args.confidences = out[1].as<float>();
            args.log_probabilities = out[2].as<float>();
            args.new_step_map = out[3].as<int32_t>();
            launch_masked_decode(args, omp_get_max_threads());
            return out;
          }};
}

Case masked_decode_partial(int batch, int length, int codes, int chunks, DType dtype, Stage stage) {
  return {"masked_decode_partial", [=] {
            const int64_t count = int64_t{batch} * length;
            const Buffer logits = normal(count * codes, dtype, 1);
            const Buffer integers(batch * sizeof(RowIntegers)), floats(batch * sizeof(RowFloats));
            Buffer state(count * kColumns * 8);
            std::memset(state.as<char>(), 0, count * kColumns * 8);
            for (int64_t i = 0; i < count; ++i) {
              int64_t* const row = state.as<int64_t>() + i * kColumns;
              row[kKind] = i % 3;
              row[kTop] = row[kFound] = sortable(4.0f);
              row[kLowest] = sortable(-2.0f);
              row[kOwner] = i % chunks;
            }
            Outputs out;
            out.emplace_back(count * chunks * partial_width(stage) * 8);
            PartialArgs args{};
            args.step = masked_decode_args(batch, length, codes, dtype, logits, integers, floats);
            args.stage = stage;
            args.shift = stage == Stage::kCount || stage == Stage::kMass ? 24 : 0;
            args.all_codes = codes;
            args.chunks = chunks;
            args.needs = {true, true, true};
            args.state = state.as<int64_t>();
            args.partials = out[0].as<int64_t>();
            launch_masked_decode_partial(args, omp_get_max_threads());
            return out;
          }};
}

std::vector<Case> all_cases() {
  constexpr DType kFloat = DType::kFloat32, kHalf = DType::kBFloat16;
  std::vector<Case> cases;
  for (const DType dtype : {kFloat, kHalf}) {
    for (const bool flag : {false, true}) {
      cases.push_back(layer_norm(700, 130, dtype, flag));
      cases.push_back(int8_linear(flag ? 1300 : 70, 104, 130, dtype));
      cases.push_back(group_norm(1, 900, 96, dtype, flag));   // chunks of an image are shared
      cases.push_back(group_norm_backward(1, 900, 96, dtype, flag));
      cases.push_back(group_norm(3, 1500, 64, dtype, flag));  // or, with 3 threads, images are
      cases.push_back(group_norm_backward(3, 1500, 64, dtype, flag));
      cases.push_back(group_norm(13, 50, 24, dtype, flag));   // images are shared
      cases.push_back(group_norm_backward(13, 50, 24, dtype, flag));
      cases.push_back(attention(2, 101, 3, 24, dtype, flag));
      cases.push_back(decode(3, 21, 1031, dtype, flag));
    }
    cases.push_back(layer_norm_backward(1100, 70, dtype));
    for (const Policy policy : {Policy::kCount, Policy::kTopK, Policy::kThreshold, Policy::kEntropy,
                                Policy::kLeftmost, Policy::kFactor}) {
      cases.push_back(masked_decode(5, 19, 1031, dtype, policy, Confidence::kMargin));
    }
    for (const Stage stage : {Stage::kPeak, Stage::kCount, Stage::kMass, Stage::kSums, Stage::kFind}) {
      cases.push_back(masked_decode_partial(3, 7, 2999, 4, dtype, stage));
    }
  }
  cases.push_back(attention(1, 65, 1, 40, kFloat, false));  // less work than threads
  cases.push_back(group_norm(1, 9000, 256, kFloat, true));  // large enough to be written past the caches
  cases.push_back(nearest(3, 3000, 33, false));             // the codes of a chunk are shared
  cases.push_back(nearest(700, 300, 17, true));             // latents are shared
  cases.push_back(nearest(40, 17'000, 64, false));          // several chunks, codes shared
  cases.push_back(nearest(1700, 3000, 4, false));           // several blocks of latents
  cases.push_back(nearest(800, 8300, 128, false));          // several chunks, latents shared
  cases.back().threads = {2};                               // more would share the codes
  return cases;
}

}  // namespace

int main() {
  int wrong = 0;
  const std::vector<Case> cases = all_cases();
  for (const Case& each : cases) {
    omp_set_num_threads(1);
    const Outputs expected = each.run();
    for (const int threads : each.threads) {
      omp_set_num_threads(threads);
      if (each.run() == expected) continue;
      std::printf("%s: other results with %d threads than with one\n", each.name.c_str(), threads);
      ++wrong;
    }
  }
  // Threads of the host program that call at the same time, each with a team of its own.
  omp_set_num_threads(2);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&, caller] {
      for (size_t i = caller; i < cases.size(); i += 2) {
        if (cases[i].name != "nearest_codebook") cases[i].run();
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  std::printf("%zu cases with up to 5 threads, instruction set %s: %d wrong\n", cases.size(), cpu_isa_name(), wrong);
  return wrong ? 1 : 0;
}
