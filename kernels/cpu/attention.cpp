// Cuts a batch into items that the threads share, and merges what was split along the keys. How a sequence is cut
// depends on its own lengths alone, so its bits never depend on its neighbours, nor on the number of threads.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention_job.h"
#include "runtime.h"

namespace foveate {
namespace {

constexpr std::int64_t kStreamRows = 16;       // up to so many rows to a key head, keys are read as they lie
constexpr std::int64_t kStreamKeys = 256;      // of one item of `stream`
constexpr std::int64_t kTileKeys = 1024;       // of one item of `tile`, where there are few rows
constexpr std::int64_t kSplitTileRows = 512;   // "few": other items keep the threads busy beyond
constexpr std::int64_t kTileRows = 96;         // of one item, at least; the more rows, the less is repacked
constexpr std::int64_t kTileValues = 24576;    // of one item's queries, at most, to stay in the second cache
constexpr std::int64_t kStreamHeads = 32;      // of one item of `stream`, at most: it has room for 64 groups of rows
constexpr std::int64_t kStreamRowBytes = 2048; // of a token are read together where there is enough to share out

std::int64_t div_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

const AttentionKernels& kernels() { return level >= kAvx512 ? attention_avx512 : attention_avx2; }

struct Plan {
  std::vector<AttentionSpan> spans;
  std::vector<AttentionItem> items;
  std::vector<AttentionMerge> merges;
  std::int64_t partial_rows = 0;
  double work = 0;  // multiply-adds, about
};

// The rows [first_row, + n_rows) of a span, split along the keys at multiples of `part`.
void add_items(Plan& plan, std::int64_t span, std::int64_t kv, std::int64_t n_kv, std::int64_t first_row,
               std::int64_t n_rows, std::int64_t n_keys, std::int64_t part) {
  const std::int64_t n_parts = div_up(n_keys, part), all = n_rows * n_kv;
  const std::int64_t merge = n_parts > 1 ? std::int64_t(plan.merges.size()) : -1;
  if (merge >= 0) plan.merges.push_back({span, kv, n_kv, first_row, n_rows, plan.partial_rows, n_parts});
  for (std::int64_t i = 0; i < n_parts; ++i) {
    plan.items.push_back({span, kv, n_kv, first_row, n_rows, i * part, std::min(n_keys, (i + 1) * part), merge,
                          plan.partial_rows + i * all});
  }
  if (merge >= 0) plan.partial_rows += n_parts * all;
}

void add_stream(Plan& plan, const AttentionJob& job, std::int64_t span, std::int64_t kv_heads, std::int64_t together) {
  const AttentionSpan& s = plan.spans[span];
  for (std::int64_t kv = 0; kv < kv_heads; kv += together)
    add_items(plan, span, kv, std::min(together, kv_heads - kv), 0, s.m * job.group, s.length, kStreamKeys);
}

// Rows of an item of `tile`. It changes no result: only the keys are added up in an order.
std::int64_t block_rows(const Plan& plan, const AttentionJob& job, std::int64_t kv_heads) {
  std::int64_t all = 0;
  for (const AttentionSpan& span : plan.spans) all += span.m * job.group * kv_heads;
  return std::clamp(all / (4 * max_threads()), kTileRows, std::max(kTileRows, kTileValues / job.d));
}

void add_tiles(Plan& plan, const AttentionJob& job, std::int64_t span, std::int64_t kv_heads, std::int64_t most) {
  const AttentionSpan& s = plan.spans[span];
  const std::int64_t rows = s.m * job.group, unit = kernels().tile_rows;
  const std::int64_t block = div_up(div_up(rows, div_up(rows, most)), unit) * unit;
  const std::int64_t part = rows <= kSplitTileRows ? kTileKeys : s.length;
  // The last rows of a causal span see most keys: they go first, and the short ones fill the gaps at the end.
  for (std::int64_t first = (rows - 1) / block * block; first >= 0; first -= block) {
    const std::int64_t n = std::min(block, rows - first);
    const std::int64_t seen = s.causal ? s.length - s.m + (first + n - 1) / job.group + 1 : s.length;
    for (std::int64_t kv = 0; kv < kv_heads; ++kv) add_items(plan, span, kv, 1, first, n, seen, part);
  }
}

// Key heads that one item of `stream` reads: neighbours in memory, unless there are too few items to share out.
std::int64_t heads_together(const Plan& plan, const AttentionJob& job, std::int64_t kv_heads) {
  std::int64_t parts = 0;
  for (const AttentionSpan& span : plan.spans) parts += div_up(span.length, kStreamKeys);
  const std::int64_t bytes = job.d * (job.stored == Stored::kFloat32 ? 4 : 2);
  const std::int64_t wanted = std::max<std::int64_t>(1, kStreamRowBytes / bytes);
  const std::int64_t affordable = parts * kv_heads / (4 * max_threads());
  return std::clamp<std::int64_t>(affordable, 1, std::min({wanted, kv_heads, kStreamHeads}));
}

void add_all(Plan& plan, const AttentionJob& job) {
  const std::int64_t kv_heads = job.heads / job.group;
  const std::int64_t together = heads_together(plan, job, kv_heads), most = block_rows(plan, job, kv_heads);
  for (std::size_t i = 0; i < plan.spans.size(); ++i) {
    const AttentionSpan& span = plan.spans[i];
    if (span.m == 0) continue;
    plan.work += 2.0 * span.m * span.length * job.heads * job.d;
    if (span.m * job.group <= kStreamRows)
      add_stream(plan, job, i, kv_heads, together);
    else
      add_tiles(plan, job, i, kv_heads, most);
  }
}

// Aligned floats of the calling thread that outlive the call: a fresh page costs more than what is written to it.
float* partials(std::int64_t n) {
  thread_local std::unique_ptr<float[]> kept;
  thread_local std::int64_t size = 0;
  if (n > size) kept.reset(new float[size = n]);
  return kept.get();
}

void run(Plan& plan, const AttentionJob& job) {
  add_all(plan, job);
  const AttentionKernels& kernel = kernels();
  float* parts = partials(plan.partial_rows * partial_width(job.d));
  const std::unique_ptr<std::atomic<std::int64_t>[]> left(new std::atomic<std::int64_t>[plan.merges.size()]);
  for (std::size_t i = 0; i < plan.merges.size(); ++i) left[i] = plan.merges[i].n_parts;
  for_each(plan.items.size(), plan.work, [&](std::int64_t i) {
    const AttentionItem& item = plan.items[i];
    const AttentionSpan& span = plan.spans[item.span];
    (span.m * job.group <= kStreamRows ? kernel.stream : kernel.tile)(job, span, item, parts);
    if (item.merge >= 0 && left[item.merge].fetch_sub(1, std::memory_order_acq_rel) == 1)
      kernel.merge(job, span, plan.merges[item.merge], parts);  // whoever comes last
  });
}

}  // namespace

void paged_attention(std::uintptr_t q, std::int64_t q_stride, std::uintptr_t keys, std::uintptr_t values,
                     bool bfloat16, std::uintptr_t cu_queries, std::uintptr_t kv_lengths, std::uintptr_t tables,
                     std::int64_t table_stride, std::uintptr_t trees, std::uintptr_t out, std::int64_t out_stride,
                     std::uintptr_t lse, std::int64_t n_seqs, std::int64_t heads, std::int64_t kv_heads,
                     std::int64_t d, std::int64_t block_tokens, float scale) {
  const AttentionJob job = {reinterpret_cast<const float*>(q), q_stride,
                            reinterpret_cast<const void*>(keys), kv_heads * d,
                            reinterpret_cast<const void*>(values), kv_heads * d,
                            bfloat16 ? Stored::kBfloat16 : Stored::kFloat32,
                            reinterpret_cast<float*>(out), out_stride, reinterpret_cast<float*>(lse),
                            heads, heads / kv_heads, d, scale, block_tokens};
  const auto* cu = reinterpret_cast<const std::int32_t*>(cu_queries);
  Plan plan;
  for (std::int64_t s = 0; s < n_seqs; ++s) {
    const auto* tree = trees ? reinterpret_cast<const bool*>(reinterpret_cast<const std::int64_t*>(trees)[s]) : nullptr;
    plan.spans.push_back({cu[s], cu[s + 1] - cu[s], reinterpret_cast<const std::int32_t*>(kv_lengths)[s],
                          reinterpret_cast<const std::int32_t*>(tables) + s * table_stride, tree, tree == nullptr});
  }
  run(plan, job);
}

void vision_attention(std::uintptr_t q, std::int64_t q_stride, std::uintptr_t k, std::int64_t k_stride,
                      std::uintptr_t v, std::int64_t v_stride, std::uintptr_t cu_lengths, std::uintptr_t out,
                      std::uintptr_t lse, std::int64_t n_segments, std::int64_t heads, std::int64_t d, float scale) {
  const AttentionJob job = {reinterpret_cast<const float*>(q), q_stride,
                            reinterpret_cast<const void*>(k), k_stride,
                            reinterpret_cast<const void*>(v), v_stride, Stored::kFloat32,
                            reinterpret_cast<float*>(out), heads * d, reinterpret_cast<float*>(lse),
                            heads, 1, d, scale, 0};
  const auto* cu = reinterpret_cast<const std::int32_t*>(cu_lengths);
  Plan plan;
  for (std::int64_t s = 0; s < n_segments; ++s) {
    const std::int64_t m = cu[s + 1] - cu[s];
    plan.spans.push_back({cu[s], m, m, nullptr, nullptr, false});
  }
  run(plan, job);
}

}  // namespace foveate
