// query_attention, query_attention_grad: a few queries read keys and values that do not train. The
// definitions are in memtl/reference/query_attention.py; sums are taken in another order than
// there, and in each instruction set in its own.
//
// Keys are read in blocks that fit L2. Of a block come, for each query, the softmax over it, the
// means of keys and values under that, and their covariance about those means; blocks are then put
// together as Chan, Golub and LeVeque do for variances ("Algorithms for computing the sample
// variance", 1983). So nothing cancels, however large the means, and room does not grow with keys.
#pragma once

#include "common/isa.h"
#include "common/layout.h"

namespace memtl {

constexpr int64_t kQueryTile = 32;  // queries that one call takes at most

// Rows of elements that lie side by side: row n of head h of sample b begins at element
// b * batch + h * head + n * row.
struct QueryRows {
  const void* data;
  int64_t batch, head, row;
};

struct QueryAttention {
  DType dtype;  // of q, k, v and grad_out
  int64_t heads, queries, keys, width, value_width;
  double scale;
  QueryRows q, k, v;
  QueryRows mask;  // one element a row; data is null where there is none
  DType mask_dtype;
};

struct QueryAttentionKernels {
  // Bytes of room for one call, which begins at a multiple of 64.
  int64_t (*room)(const QueryAttention& attention, bool jacobian, bool grad);
  // Queries [first, last) of a head, counted through all samples. out [heads, queries, value_width]
  // in the dtype of q; jacobian [heads, queries, width, value_width], or null.
  void (*forward)(const QueryAttention& attention, int64_t head, int64_t first, int64_t last,
                  void* out, DType jacobian_dtype, void* jacobian, void* room);
  // grad_q [heads, queries, width] in the dtype of q.
  void (*grad)(const QueryAttention& attention, const QueryRows& grad_out, int64_t head,
               int64_t first, int64_t last, void* grad_q, void* room);
};

MEMTL_DECLARE_KERNELS(QueryAttentionKernels, query_attention)

}  // namespace memtl
