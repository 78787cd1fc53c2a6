// Paged attention in the exact kind. A unit is some consecutive rows of one sequence under one KV head; its queries share
// every reading of K and V, and none of them sees what the others do.
#pragma once

#include <type_traits>

#include "vai/math.h"
#include "vai/ops.h"

namespace vai {
namespace {

// Elements as they are stored; those of kQ8_0 are codes, to be multiplied with their scales, which changes no bit of them.
template <class V, KvType T>
inline typename V::F load_kv(const void* p) {
  if constexpr (T == KvType::kBf16)
    return V::load_bf16(p);
  else if constexpr (T == KvType::kQ8_0)
    return V::load_i8(p);
  else
    return V::load((const float*)p);
}
template <KvType T>
constexpr size_t kKvBytes = T == KvType::kBf16 ? 2 : T == KvType::kQ8_0 ? 1 : 4;

template <KvType T>
inline float load_kv_one(const uint8_t* p) {
  if constexpr (T == KvType::kBf16)
    return bf16_to_f32(load_as<uint16_t>(p));
  else if constexpr (T == KvType::kQ8_0)
    return float(load_as<int8_t>(p));
  else
    return load_as<float>(p);
}

// Bytes of scales before the elements of so many tokens.
template <KvType T>
size_t scale_bytes(int head_dim, size_t tokens) {
  return T == KvType::kQ8_0 ? 2 * size_t(kv_scales(head_dim)) * tokens : 0;
}

// scores[i][0..16) of 16 tokens whose keys stand at `keys` as [head_dim][16], after their scales.
template <class V, KvType T, int Q>
void score(const uint8_t* keys, int head_dim, const float* const* q, float scale, float* const* scores) {
  using F = typename V::F;
  constexpr int W = V::kLanes, H = 16 / W;
  F acc[Q][H];
  VAI_UNROLL for (int i = 0; i < Q; ++i) VAI_UNROLL for (int h = 0; h < H; ++h) acc[i][h] = V::set1(0.0f);
  const uint8_t* scales = keys;
  keys += scale_bytes<T>(head_dim, 16);
  for (int d = 0; d < head_dim; scales += 32) {
    const int end = T == KvType::kQ8_0 && d + kKvGroup < head_dim ? d + kKvGroup : head_dim;
    F s[H];
    if constexpr (T == KvType::kQ8_0) VAI_UNROLL for (int h = 0; h < H; ++h) s[h] = V::load_bf16(scales + h * W * 2);
    for (; d < end; ++d, keys += 16 * kKvBytes<T>) {
      F k[H];
      VAI_UNROLL for (int h = 0; h < H; ++h) {
        k[h] = load_kv<V, T>(keys + h * W * kKvBytes<T>);
        if constexpr (T == KvType::kQ8_0) k[h] = V::mul(k[h], s[h]);
      }
      VAI_UNROLL for (int i = 0; i < Q; ++i) {
        const F x = V::set1(q[i][d]);
        VAI_UNROLL for (int h = 0; h < H; ++h) acc[i][h] = V::accumulate(acc[i][h], V::mul(x, k[h]));
      }
    }
  }
  VAI_UNROLL for (int i = 0; i < Q; ++i)
    VAI_UNROLL for (int h = 0; h < H; ++h) V::store(scores[i] + h * W, V::mul(acc[i][h], V::set1(scale)));
}

// The columns [d, d + N * kLanes) of `weigh`.
template <class V, KvType T, int Q, int N>
void weigh_columns(const uint8_t* values, const uint8_t* scales, int head_dim, int d, int tokens, const float* const* e, float* const* o) {
  using F = typename V::F;
  constexpr int W = V::kLanes;
  F acc[Q][N];
  VAI_UNROLL for (int i = 0; i < Q; ++i) VAI_UNROLL for (int n = 0; n < N; ++n) acc[i][n] = V::load(o[i] + d + n * W);
  values += size_t(d) * kKvBytes<T>;
  for (int t = 0; t < tokens; ++t, values += size_t(head_dim) * kKvBytes<T>, scales += scale_bytes<T>(head_dim, 1)) {
    auto value = [&](int n) {
      const F x = load_kv<V, T>(values + size_t(n * W) * kKvBytes<T>);
      if constexpr (T != KvType::kQ8_0) return x;
      return V::mul(x, V::set1(load_kv_one<KvType::kBf16>(scales + (d + n * W) / kKvGroup * 2)));
    };
    if constexpr (Q == 1) {  // as many sums as there are values, which would not all fit beside them
      const F weight = V::set1(e[0][t]);
      VAI_UNROLL for (int n = 0; n < N; ++n) acc[0][n] = V::accumulate(acc[0][n], V::mul(weight, value(n)));
    } else {
      F x[N];
      VAI_UNROLL for (int n = 0; n < N; ++n) x[n] = value(n);
      VAI_UNROLL for (int i = 0; i < Q; ++i) {
        const F weight = V::set1(e[i][t]);
        VAI_UNROLL for (int n = 0; n < N; ++n) acc[i][n] = V::accumulate(acc[i][n], V::mul(weight, x[n]));
      }
    }
  }
  VAI_UNROLL for (int i = 0; i < Q; ++i) VAI_UNROLL for (int n = 0; n < N; ++n) V::store(o[i] + d + n * W, acc[i][n]);
}

// o[i][0..head_dim) += e[i][t - from] * v[t] for t in [from, to), values of a page at `values` as [kPageTokens][head_dim],
// after their scales.
template <class V, KvType T, int Q>
void weigh(const uint8_t* values, int head_dim, int from, int to, const float* const* e, float* const* o) {
  constexpr int W = V::kLanes;
  constexpr auto fits = [](int n) { return n * W <= 64 && (Q == 1 || (Q + 1) * n + 2 <= V::kRegisters); };
  constexpr int N = fits(8) ? 8 : fits(4) ? 4 : fits(2) ? 2 : 1;
  const size_t row = size_t(head_dim) * kKvBytes<T>;
  const uint8_t* scales = values + scale_bytes<T>(head_dim, size_t(from));
  values += scale_bytes<T>(head_dim, kPageTokens) + size_t(from) * row;
  int d = 0;
  for (; d + N * W <= head_dim; d += N * W) weigh_columns<V, T, Q, N>(values, scales, head_dim, d, to - from, e, o);
  for (; d + W <= head_dim; d += W) weigh_columns<V, T, Q, 1>(values, scales, head_dim, d, to - from, e, o);
  for (; d < head_dim; ++d)
    for (int i = 0; i < Q; ++i) {
      float sum = o[i][d];
      for (int t = 0; t < to - from; ++t) {
        float x = load_kv_one<T>(values + size_t(t) * row + size_t(d) * kKvBytes<T>);
        if constexpr (T == KvType::kQ8_0)
          x = x * load_kv_one<KvType::kBf16>(scales + scale_bytes<T>(head_dim, size_t(t)) + size_t(d / kKvGroup * 2));
        sum = sum + e[i][t] * x;
      }
      o[i][d] = sum;
    }
}

// 16 keys as `score` reads those of kF32.
template <class V, KvType T>
void widen_keys(const uint8_t* keys, int head_dim, float* out) {
  constexpr int W = V::kLanes, H = 16 / W;
  const uint8_t* scales = keys;
  keys += scale_bytes<T>(head_dim, 16);
  for (int d = 0; d < head_dim; ++d, keys += 16 * kKvBytes<T>, out += 16)
    VAI_UNROLL for (int h = 0; h < H; ++h) {
      auto k = load_kv<V, T>(keys + h * W * kKvBytes<T>);
      if constexpr (T == KvType::kQ8_0) k = V::mul(k, V::load_bf16(scales + d / kKvGroup * 32 + h * W * 2));
      V::store(out + h * W, k);
    }
}

// The values [from, to) of a page as `weigh` reads those of kF32.
template <class V, KvType T>
void widen_values(const uint8_t* values, int head_dim, int from, int to, float* out) {
  constexpr int W = V::kLanes;
  const uint8_t* scales = values + scale_bytes<T>(head_dim, size_t(from));
  values += scale_bytes<T>(head_dim, kPageTokens) + size_t(from) * size_t(head_dim) * kKvBytes<T>;
  out += size_t(from) * size_t(head_dim);
  for (int t = from; t < to; ++t, values += size_t(head_dim) * kKvBytes<T>, scales += scale_bytes<T>(head_dim, 1), out += head_dim) {
    int d = 0;
    for (; d + W <= head_dim; d += W) {
      auto x = load_kv<V, T>(values + size_t(d) * kKvBytes<T>);
      if constexpr (T == KvType::kQ8_0) x = V::mul(x, V::set1(load_kv_one<KvType::kBf16>(scales + d / kKvGroup * 2)));
      V::store(out + d, x);
    }
    for (; d < head_dim; ++d) {
      out[d] = load_kv_one<T>(values + size_t(d) * kKvBytes<T>);
      if constexpr (T == KvType::kQ8_0) out[d] = out[d] * load_kv_one<KvType::kBf16>(scales + d / kKvGroup * 2);
    }
  }
}

// s[t] = cap * tanh(s[t] / cap) for t in [begin, end), both multiples of 16.
template <class V>
void cap_scores(float* s, int begin, int end, float cap) {
  for (int t = begin; t < end; t += V::kLanes)
    V::store(s + t, softcapped<V>(V::load(s + t), cap));
}

// Scores to weights: e[t] = exp(s[t] - max) for t in [first, end), 0 on either side from a multiple of 16 to one.
template <class V>
void soften(float* s, int first, int end) {
  using F = typename V::F;
  constexpr int W = V::kLanes, kAtOnce = 4;
  const int begin = first & ~15, last = (end + 15) / 16 * 16;
  for (int t = begin; t < first; ++t) s[t] = -__builtin_inff();  // of which exp is 0
  for (int t = end; t < last; ++t) s[t] = -__builtin_inff();
  F top = V::set1(-__builtin_inff());
  for (int t = begin; t < last; t += W) top = V::max(V::load(s + t), top);
  float lanes[W];
  V::store(lanes, top);
  float m = lanes[0];
  for (int i = 1; i < W; ++i) m = lanes[i] > m ? lanes[i] : m;
  auto weights = [&]<int kCount>(float* at) {
    F x[kCount];
    VAI_UNROLL for (int i = 0; i < kCount; ++i) x[i] = V::sub(V::load(at + i * W), V::set1(m));
    exp<V>(x);
    VAI_UNROLL for (int i = 0; i < kCount; ++i) V::store(at + i * W, x[i]);
  };
  int t = begin;
  for (; t + kAtOnce * W <= last; t += kAtOnce * W) weights.template operator()<kAtOnce>(s + t);
  for (; t < last; t += W) weights.template operator()<1>(s + t);
}

// The R16 sum of a chunk's weights.
template <class V>
float chunk_sum(const float* e, int count) {
  constexpr int W = V::kLanes, H = 16 / W;
  typename V::F p[H];
  for (int h = 0; h < H; ++h) p[h] = V::set1(0.0f);
  for (int t = 0; t < count; t += 16)
    for (int h = 0; h < H; ++h) p[h] = V::add(p[h], V::load(e + t + h * W));
  float partial[16];
  for (int h = 0; h < H; ++h) V::store(partial + h * W, p[h]);
  return sum16(partial);
}

// One query of a tile: it sees the tokens [first, end).
struct Query {
  const float* q;
  float* out;
  int first, end;
};

// Calls part<Q>(i) for queries i to i + Q - 1, all of them in turn: as many at once as registers hold the sums of.
template <class V, class Part>
void in_groups(int queries, Part&& part) {
  constexpr int kMost = V::kLanes == 8 ? 6 : 8;
  for (int i = 0; i < queries;) {
    const int left = queries - i;
    auto take = [&](auto count) { part.template operator()<count>(i), i += count; };
    if (left >= kMost && (left >= 2 * kMost || left % kMost != 1)) take(std::integral_constant<int, kMost>{});
    else if (left >= 4 && left != 5) take(std::integral_constant<int, 4>{});
    else if (left >= 3) take(std::integral_constant<int, 3>{});
    else if (left == 2) take(std::integral_constant<int, 2>{});
    else take(std::integral_constant<int, 1>{});
  }
}

// All queries of a tile, of one sequence and KV head; `first` and `end` ascend. Where they are more than one group, keys and
// values are widened to floats once for all of them.
template <class V, KvType T>
void attend(const AttentionArgs& a, int sequence, int kv_head, int queries, const Query* query, float* scratch) {
  const int width = a.pages.head_dim, padded = (width + 15) / 16 * 16, longest = query[queries - 1].end;
  const int begin = query[0].first & ~15;  // nothing before it is read
  const bool widen = T != KvType::kF32 && queries > (V::kLanes == 8 ? 7 : 8);
  float *s[kAttentionQueries], *chunk[kAttentionQueries], *o[kAttentionQueries], *sums[kAttentionQueries];
  float* wide = scratch;
  scratch += size_t(kPageTokens) * size_t(padded);
  for (int i = 0; i < queries; ++i) {
    s[i] = scratch + size_t(i) * a.context;
    chunk[i] = scratch + size_t(queries) * a.context + size_t(2 * i) * size_t(padded);
    o[i] = chunk[i] + padded;
  }
  for (int t = begin; t < longest; t += 16) {
    const uint8_t* keys = a.pages.keys(sequence, t, kv_head);
    if (widen) widen_keys<V, T>(keys, width, wide);
    in_groups<V>(queries, [&]<int Q>(int i) {
      const float* q[Q];
      float* at[Q];
      for (int j = 0; j < Q; ++j) q[j] = query[i + j].q, at[j] = s[i + j] + t;
      if (widen)
        score<V, KvType::kF32, Q>((const uint8_t*)wide, width, q, a.scale, at);
      else
        score<V, T, Q>(keys, width, q, a.scale, at);
    });
  }
  float l[kAttentionQueries] = {};
  for (int i = 0; i < queries; ++i) {
    if (a.softcap != 0.0f) cap_scores<V>(s[i], begin, (longest + 15) / 16 * 16, a.softcap);
    soften<V>(s[i], query[i].first, query[i].end);
  }
  for (int c = begin / kAttentionChunk * kAttentionChunk; c < longest; c += kAttentionChunk) {
    const int chunk_end = longest - c < kAttentionChunk ? longest : c + kAttentionChunk;
    for (int i = 0; i < queries; ++i) {  // the first chunk that a query sees something of goes straight to the result
      sums[i] = c <= query[i].first ? o[i] : chunk[i];
      for (int d = 0; d < padded; ++d) sums[i][d] = 0.0f;
    }
    for (int t = c > begin ? c : begin / kPageTokens * kPageTokens; t < chunk_end; t += kPageTokens) {
      const uint8_t* values = a.pages.values(sequence, t, kv_head);
      const int last = chunk_end - t < kPageTokens ? chunk_end : t + kPageTokens;
      if (widen) widen_values<V, T>(values, width, begin > t ? begin - t : 0, last - t, wide);
      auto add = [&]<int Q>(int i, int from, int to) {
        const float* e[Q];
        for (int j = 0; j < Q; ++j) e[j] = s[i + j] + from;
        if (from >= to) return;
        if (widen)
          weigh<V, KvType::kF32, Q>((const uint8_t*)wide, width, from - t, to - t, e, sums + i);
        else
          weigh<V, T, Q>(values, width, from - t, to - t, e, sums + i);
      };
      in_groups<V>(queries, [&]<int Q>(int i) {
        // All of the group see [from, to); before it those see more that come first, behind it those that come last.
        const int shortest = query[i].end, latest = query[i + Q - 1].first;
        const int to = shortest < t ? t : shortest < last ? shortest : last;
        const int from = latest < t ? t : latest < to ? latest : to;
        for (int j = i; j < i + Q - 1; ++j) add.template operator()<1>(j, query[j].first < t ? t : query[j].first, from);
        add.template operator()<Q>(i, from, to);
        for (int j = i; j < i + Q; ++j)
          add.template operator()<1>(j, query[j].first < to ? to : query[j].first, query[j].end < last ? query[j].end : last);
      });
    }
    for (int i = 0; i < queries; ++i) {
      const auto [q, out, first, end] = query[i];
      const int seen = end < chunk_end ? end : chunk_end, from = c > (first & ~15) ? c : first & ~15;
      if (seen <= from) continue;
      const float sum = chunk_sum<V>(s[i] + from, seen - from);
      l[i] = c <= first ? sum : l[i] + sum;
      if (c > first)
        for (int d = 0; d < width; ++d) o[i][d] = o[i][d] + chunk[i][d];
    }
  }
  for (int i = 0; i < queries; ++i)
    for (int d = 0; d < width; ++d) query[i].out[d] = o[i][d] / l[i];
}

// Calls part(sequence, kv_head, queries, query) for the queries of a unit, at most kMost at once.
template <int kMost, class Part>
void each_queries(const AttentionArgs& a, int unit, Part&& part) {
  const RowTile tile = a.tiles[unit / a.pages.kv_heads];
  const int kv_head = unit % a.pages.kv_heads, shared = a.heads / a.pages.kv_heads, queries = tile.rows * shared;
  for (int i = 0; i < queries; i += kMost) {
    Query query[kMost];
    const int count = queries - i < kMost ? queries - i : kMost;
    for (int j = 0; j < count; ++j) {
      const size_t row = size_t(tile.first + (i + j) / shared);
      const size_t column = size_t(kv_head * shared + (i + j) % shared) * size_t(a.pages.head_dim);
      const int end = a.positions[row] + 1;
      query[j] = {a.q + row * a.ldq + column, a.out + row * a.ldo + column, a.window && end > a.window ? end - a.window : 0, end};
    }
    part(a.sequence_of_row[tile.first], kv_head, count, query);
  }
}

template <class V>
void attention(const AttentionArgs& a, int unit, float* scratch) {
  each_queries<kAttentionQueries>(a, unit, [&](int sequence, int kv_head, int queries, const Query* query) {
    if (a.pages.type == KvType::kBf16)
      attend<V, KvType::kBf16>(a, sequence, kv_head, queries, query, scratch);
    else if (a.pages.type == KvType::kQ8_0)
      attend<V, KvType::kQ8_0>(a, sequence, kv_head, queries, query, scratch);
    else
      attend<V, KvType::kF32>(a, sequence, kv_head, queries, query, scratch);
  });
}

}  // namespace
}  // namespace vai
