// Divides attention into pieces of work for the threads.
#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "attention_run.h"

namespace glm4 {
namespace {

constexpr int64_t kRowsWorthThreads = 32;        // fewest new positions whose keys and values several threads store
constexpr int64_t kMost = 1 << 16;               // limit of group and dim, so that sizes of a piece fit an int
constexpr int64_t kMostPartialFloats = 8 << 20;  // most partial results (32 MB) for a split of sequences into chunks

enum Purpose { kScratch, kPartials };

// Memory of one thread, reused by later runs.
template <Purpose>
float* thread_memory(size_t floats) {
  thread_local std::vector<float> memory;
  if (memory.size() < floats + 16) memory.resize(floats + 16);
  const size_t past = reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % 16;
  return memory.data() + (16 - past) % 16;  // aligned to a cache line
}

class Run {
 public:
  Run(const AttentionKernels& kernels, const AttentionShape& shape, const AttentionData& data)
      : kernels_(kernels), shape_(shape), data_(data), rows_(shape.together() * shape.group) {
    for (int64_t b = 0; b < shape.batch; ++b) chunks_ = std::max(chunks_, chunks_of(b));
    // One piece per sequence and head may be too few for the threads. Then each chunk of keys is a piece of its own.
    const int64_t heads = shape.batch * shape.kv_heads;
    split_ = shape.pieces() == 1 && chunks_ > 1 && heads * chunks_ * partial_floats() <= kMostPartialFloats;
    if (!split_) return;
    partials_ = thread_memory<kPartials>(size_t(heads * chunks_ * partial_floats()));
    left_ = std::make_unique<std::atomic<int64_t>[]>(size_t(heads));
    for (int64_t head = 0; head < heads; ++head) left_[head] = chunks_of(head / shape.kv_heads);
  }

  ort::Status* run(const Threads& threads, bool* starved) {
    const int64_t new_rows = shape_.batch * shape_.sequence;
    ort::Status* failed = nullptr;
    if (new_rows < kRowsWorthThreads)
      for (int64_t row = 0; row < new_rows; ++row) store(row);
    else
      failed = threads.run([](void* p, size_t row) { static_cast<Run*>(p)->store_or_starve(int64_t(row)); },
                           size_t(new_rows), this);
    if (failed != nullptr) return failed;
    const int64_t heads = shape_.batch * shape_.kv_heads;
    const int64_t total = heads * (split_ ? chunks_ : shape_.pieces());
    failed = threads.run([](void* p, size_t at) { static_cast<Run*>(p)->work(int64_t(at)); }, size_t(total), this);
    *starved = starved_;
    return failed;
  }

 private:
  int64_t padded_rows() const { return (rows_ + kWidest - 1) / kWidest * kWidest; }
  int64_t partial_floats() const { return padded_rows() * (shape_.padded() + 2); }
  size_t scratch_floats() const {
    return size_t(shape_.dim * kKeys + kChunk * shape_.padded() + rows_ * (kChunk + shape_.padded()));
  }

  Partial partial_at(float* at) const {
    return {at, at + padded_rows(), at + 2 * padded_rows()};
  }

  int64_t chunks_of(int64_t b) const {
    return data_.lengths[b] <= 0 ? 0 : (data_.past_of(b) + data_.lengths[b] + kChunk - 1) / kChunk;
  }

  void store_or_starve(int64_t row) {
    try {
      store(row);
    } catch (const std::exception&) {  // C callers cannot handle exceptions
      starved_ = true;
    }
  }

  void store(int64_t row) const {
    const int64_t b = row / shape_.sequence, i = row % shape_.sequence;
    if (i >= data_.lengths[b]) return;
    const int64_t position = data_.past_of(b) + i;
    float* memory = thread_memory<kScratch>(size_t(shape_.dim));
    for (int64_t h = 0; h < shape_.kv_heads; ++h) {
      const int64_t from = (row * shape_.kv_heads + h) * shape_.dim;
      const size_t to = offset(b, h, position);
      kernels_.store_row(shape_, data_.key + from, cos_of(position), sin_of(position), factors_of(h), memory,
                         static_cast<char*>(data_.keys) + to);
      kernels_.store_row(shape_, data_.value + from, nullptr, nullptr, nullptr, memory,
                         static_cast<char*>(data_.values) + to);
    }
  }

  // Bytes before a row of the cache.
  size_t offset(int64_t b, int64_t h, int64_t position) const {
    return size_t((b * shape_.kv_heads + h) * shape_.capacity + position) * shape_.row_bytes();
  }

  const float* factors_of(int64_t h) const {
    return data_.factors == nullptr ? nullptr : data_.factors + h * shape_.dim;
  }

  const float* cos_of(int64_t position) const { return data_.cos + position * (shape_.rotary / 2); }
  const float* sin_of(int64_t position) const { return data_.sin + position * (shape_.rotary / 2); }

  void work(int64_t at) {
    try {
      const int64_t heads = shape_.batch * shape_.kv_heads;
      if (split_)
        one_chunk(at / chunks_, at % chunks_);
      else  // last positions first, because they see the most keys
        all_chunks(at % heads, shape_.pieces() - 1 - at / heads);
    } catch (const std::exception&) {  // C callers cannot handle exceptions
      starved_ = true;
    }
  }

  // Positions first ... first + count - 1 of sequence b, for kv head h.
  struct Piece {
    int64_t b, h, first, count;
  };

  const float* turned(const Piece& piece, float* queries) const {
    const int64_t width = shape_.kv_heads * shape_.group * shape_.dim;
    for (int64_t i = 0; i < piece.count; ++i) {
      const int64_t row = piece.b * shape_.sequence + piece.first + i;
      const int64_t position = data_.past_of(piece.b) + piece.first + i;
      kernels_.turn_queries(shape_, data_.query + row * width + piece.h * shape_.group * shape_.dim, cos_of(position),
                            sin_of(position), factors_of(piece.h), queries + i * shape_.group * shape_.padded());
    }
    return queries;
  }

  AttentionScratch scratch_at(float* at) const {
    float* values = at + shape_.dim * kKeys;
    return {at, values, values + kChunk * shape_.padded()};
  }

  // Number of keys from the chunk's start on that the first position sees; zero or negative if it sees none.
  int64_t first_sees(const Piece& piece, int64_t chunk) const {
    return data_.past_of(piece.b) + piece.first + 1 - chunk * kChunk;
  }

  void attend(const Piece& piece, int64_t chunk, const float* queries, const AttentionScratch& scratch,
              const Partial& to) const {
    const int64_t start = chunk * kChunk, first = first_sees(piece, chunk), last = first + piece.count - 1;
    const size_t at = offset(piece.b, piece.h, start);
    const Attended some = {queries,
                           int(piece.count * shape_.group),
                           int(shape_.group),
                           static_cast<const char*>(data_.keys) + at,
                           static_cast<const char*>(data_.values) + at,
                           int(first < kChunk ? first : kChunk),
                           int(last < kChunk ? last : kChunk)};
    kernels_.attend(shape_, some, scratch, to);
  }

  // Rows that see no key of the later chunk are left unchanged.
  void merge(const Piece& piece, int64_t chunk, const Partial& sum, const Partial& later) const {
    const int64_t first = first_sees(piece, chunk), blind = first > 0 ? 0 : (1 - first) * shape_.group;
    kernels_.merge(shape_, int(blind), int(piece.count * shape_.group), sum, later);
  }

  void finish(const Piece& piece, const Partial& partial) const {
    const int64_t width = shape_.kv_heads * shape_.group * shape_.dim;
    for (int64_t i = 0; i < piece.count; ++i) {
      const int64_t row = piece.b * shape_.sequence + piece.first + i;
      kernels_.finish(shape_, partial, int(i * shape_.group),
                      data_.output + row * width + piece.h * shape_.group * shape_.dim);
    }
  }

  void all_chunks(int64_t head, int64_t index) const {
    Piece piece = {head / shape_.kv_heads, head % shape_.kv_heads, index * shape_.together(), shape_.together()};
    const int64_t left = data_.lengths[piece.b] - piece.first;
    if (left <= 0) return;
    if (piece.count > left) piece.count = left;
    float* memory = thread_memory<kScratch>(scratch_floats() + 2 * size_t(partial_floats()));
    const AttentionScratch scratch = scratch_at(memory);
    const float* queries = turned(piece, scratch.scores + rows_ * kChunk);
    const Partial sum = partial_at(memory + scratch_floats());
    const Partial later = partial_at(memory + scratch_floats() + partial_floats());
    const int64_t chunks = (data_.past_of(piece.b) + piece.first + piece.count + kChunk - 1) / kChunk;
    attend(piece, 0, queries, scratch, sum);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      attend(piece, chunk, queries, scratch, later);
      merge(piece, chunk, sum, later);
    }
    finish(piece, sum);
  }

  void one_chunk(int64_t head, int64_t chunk) {
    const Piece piece = {head / shape_.kv_heads, head % shape_.kv_heads, 0, data_.lengths[head / shape_.kv_heads]};
    const int64_t chunks = chunks_of(piece.b);
    if (chunk >= chunks) return;
    float* memory = thread_memory<kScratch>(scratch_floats());
    const AttentionScratch scratch = scratch_at(memory);
    const float* queries = turned(piece, scratch.scores + rows_ * kChunk);
    attend(piece, chunk, queries, scratch, partial_of(head, chunk));
    if (left_[head].fetch_sub(1) != 1) return;
    // The thread that finishes the last chunk merges all chunks, in order.
    const Partial sum = partial_of(head, 0);
    for (int64_t later = 1; later < chunks; ++later) merge(piece, later, sum, partial_of(head, later));
    finish(piece, sum);
  }

  Partial partial_of(int64_t head, int64_t chunk) {
    return partial_at(partials_ + (head * chunks_ + chunk) * partial_floats());
  }

  const AttentionKernels& kernels_;
  const AttentionShape& shape_;
  const AttentionData& data_;
  const int64_t rows_;  // most rows of a piece
  int64_t chunks_ = 1;  // number of chunks of the longest sequence
  bool split_ = false;
  float* partials_ = nullptr;  // partial results of all chunks, in the calling thread's memory
  std::unique_ptr<std::atomic<int64_t>[]> left_;  // number of unfinished chunks, by sequence and head
  std::atomic<bool> starved_{false};
};

}  // namespace

const char* refusal(const AttentionShape& shape) {
  if (shape.kv_heads <= 0 || shape.group <= 0 || shape.dim <= 0) return "num_heads is no multiple of kv_num_heads";
  if (shape.group > kMost || shape.dim > kMost) return "more than 65536 query heads for a key head, or dims of a head";
  if (shape.batch < 0 || shape.sequence < 0 || shape.capacity < 0) return "a size is negative";
  if (shape.rotary < 0 || shape.rotary % 2 != 0 || shape.rotary > shape.dim)
    return "rotary_embedding_dim must be even, and no more than the head size";
  return nullptr;
}

const char* refusal(const AttentionShape& shape, const AttentionData& data) {
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t past = data.past_of(b), count = data.lengths[b];
    if (past < 0 || count < 0 || count > shape.sequence) return "past_lengths or query_lengths is out of range";
    if (past + count > shape.capacity) return "a sequence does not fit into the cache";
    if (shape.rotary > 0 && past + count > shape.positions) return "a sequence is longer than the cos and sin tables";
  }
  return nullptr;
}

ort::Status* attend(const AttentionKernels& kernels, const AttentionShape& shape, const AttentionData& data,
                    const Threads& threads, bool* starved) {
  *starved = false;
  if (shape.batch == 0 || shape.sequence == 0) return nullptr;
  return Run(kernels, shape, data).run(threads, starved);
}

}  // namespace glm4
