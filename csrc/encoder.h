// A BERT-like encoder for inference, as one call: what fastffn/serve packs from a model's layers.
//
//   h [tokens, H] -> L x ( h = LayerNorm(h + out(attention(h)));
//                          for each unit: h = LayerNorm(h + epilogue(down(middle(up(h))))) )
//
// or, with the norms before, h = h + out(attention(LayerNorm(h))) and so on, and a norm in the end.
//
// Tokens are those of all texts one after the other, without padding. Weights are packed once, in
// float, bfloat16 or int8; sums, the residual stream, attention, elementwise programs and norms are
// in float in any case.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "packed.h"
#include "program.h"

namespace fastffn {

// What a Program of a unit reads.
enum class Source : uint8_t { kFirst, kGate, kInput, kSecond };  // z1, zg, x, z2

struct Segment {
  std::unique_ptr<Program> program;  // null: the first source as it is
  std::vector<Source> sources;
};

struct Norm {
  std::vector<float> weight, bias;  // [H]; ones and zeros where the model has none; empty: no norm
  float eps;
};

// A feed-forward unit, see fastffn/ops/ffn.py.
struct Unit {
  PackedLinear first;   // up, or up and gate
  PackedLinear second;  // down
  int64_t width;        // I
  Segment prologue, middle, epilogue;
  Norm norm;
};

struct Layer {
  PackedLinear qkv;
  PackedLinear output;
  float scale;  // of the scores
  // Rotation of queries and keys by their positions, [places, head size / 2]; null: none.
  const float* cosines = nullptr;
  const float* sines = nullptr;
  int64_t window = -1;  // a token sees those up to so far from it; -1: all
  Norm norm;
  std::vector<Unit> units;
};

// What a token begins with: LayerNorm(word + position + segment), of the width E of the tables.
//
// `before`: words are of another width and projected to E first; with `trigram` each together with
// its neighbours, zeros beyond the ends of a text. `after`: the normalised sum is projected from E
// to H. Tables are not copied.
struct Embeddings {
  const float* words = nullptr;  // [vocabulary, width]; null: the caller gives the hidden states
  int64_t vocabulary = 0;
  int64_t width = 0;
  bool trigram = false;
  PackedLinear before, after;        // no panels: none
  const float* positions = nullptr;  // [places, E], or null
  const float* segments = nullptr;   // [kinds, E], or null
  int64_t kinds = 0;
  Norm norm;

  int64_t sum_width() const { return norm.weight.size(); }  // E
};

struct Encoder {
  int64_t hidden;
  int64_t heads;
  int64_t head_size;
  Precision precision;
  bool pre_norm = false;
  Embeddings embeddings;
  Norm last;  // behind all layers, where norms stand before
  std::vector<std::unique_ptr<Layer>> layers;
  int64_t places = INT64_MAX;  // positions that its tables have
  std::vector<int> order;      // of the layers, some more than once if weights are shared

  // The widest first product of all units, in columns.
  int64_t widest() const;
};

// One forward.
struct Encoding {
  const Encoder* encoder;
  const int64_t* ids;     // [tokens], or null: `hidden` holds the embeddings
  const int64_t* places;  // [tokens], rising within a text; null: each token's number in its text
  const int64_t* kinds;   // [tokens], the segments; null: all 0
  float* hidden;          // [tokens, H], contiguous: (read and) overwritten
  const int64_t* starts;  // [texts + 1], rising from 0 to the number of tokens
  int64_t texts;
  const float* bias;  // added to the scores, [heads, bias_length, bias_length]; null: none
  int64_t bias_length;
  int threads;
};

}  // namespace fastffn
