#include "query_attention.h"

#include <memory>
#include <new>
#include <optional>
#include <tuple>

#include "tensor.h"

namespace memtl {
namespace {

// Tensors with what the kernels are told of them; those that are copied live as long as this.
struct Operands {
  Tensor q, k, v;
  std::optional<Tensor> mask;
  QueryAttention attention;
};

Tensor rows_side_by_side(const Tensor& x) {
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

// A sample or a head of which there is one stands for all of them.
int64_t stride_of(const Tensor& x, int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

QueryRows rows_of(const Tensor& x) {
  return {x.const_data_ptr(), stride_of(x, 0), stride_of(x, 1), x.stride(2)};
}

Operands checked(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& mask, double scale) {
  const DType dtype = floating(op, "q", q.scalar_type());
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op,
                  ": expected q, k, v of one dtype, got ", describe(q), ", ", describe(k), ", ",
                  describe(v));
  bool fits = q.dim() == 4 && k.dim() == 4 && v.dim() == 4;
  fits = fits && (q.size(0) == 1 || q.size(0) == k.size(0)) && q.size(1) == k.size(1) &&
         q.size(3) == k.size(3);
  for (int64_t i = 0; fits && i < 3; ++i) fits = k.size(i) == v.size(i);
  STD_TORCH_CHECK(fits, op, ": expected q [B or 1, H, T, d], k [B, H, N, d], v [B, H, N, e], got ",
                  describe(q), ", ", describe(k), ", ", describe(v));
  Operands x{rows_side_by_side(q), rows_side_by_side(k), rows_side_by_side(v), mask, {}};
  x.attention = {dtype, k.size(1),    q.size(2),    k.size(2),    k.size(3), v.size(3),
                 scale, rows_of(x.q), rows_of(x.k), rows_of(x.v), {},        DType::f32};
  if (mask) {
    x.attention.mask_dtype = floating(op, "mask", mask->scalar_type());
    STD_TORCH_CHECK(
        mask->dim() == 3 && (mask->size(0) == 1 || mask->size(0) == k.size(0)) &&
            (mask->size(1) == 1 || mask->size(1) == k.size(1)) && mask->size(2) == k.size(2),
        op, ": expected mask [B or 1, H or 1, N] for k ", describe(k), ", got ", describe(*mask));
    x.attention.mask = rows_of(*mask);
  }
  return x;
}

// Calls run(head, first, last, room) for the queries of every head, in parallel.
template <class Run>
void for_queries(const QueryAttention& attention, int64_t heads, int64_t room, const Run& run) {
  const int64_t queries = attention.queries;
  if (heads == 0 || queries == 0) return;
  // As many tasks as there are threads, where queries are enough for that.
  const int64_t wanted = ceil_div(torch::stable::get_num_threads(), heads);
  const int64_t each = std::min(kQueryTile, ceil_div(queries, wanted));
  const int64_t tiles = ceil_div(queries, each);
  torch::stable::parallel_for(0, heads * tiles, 1, [&](int64_t begin, int64_t end) {
    constexpr std::align_val_t kAlign{64};
    const auto release = [](void* p) { ::operator delete(p, kAlign); };
    const std::unique_ptr<void, decltype(release)> own(
        ::operator new(static_cast<size_t>(room), kAlign), release);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % tiles * each;
      run(task / tiles, first, std::min(queries, first + each), own.get());
    }
  });
}

std::tuple<Tensor, Tensor> query_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const std::optional<Tensor>& mask, double scale,
                                               std::optional<ScalarType> jacobian) {
  const char* op = "query_attention";
  const Operands x = checked(op, q, k, v, mask, scale);
  const QueryAttention& attention = x.attention;
  const DType dtype = jacobian ? floating(op, "jacobian", *jacobian) : attention.dtype;
  const int64_t batch = k.size(0), heads = batch * attention.heads;
  const int64_t size[] = {batch, attention.heads, attention.queries, attention.value_width};
  Tensor out = torch::stable::new_empty(q, size);
  const int64_t full[] = {batch, attention.heads, attention.queries, attention.width,
                          attention.value_width};
  const int64_t none[] = {0};
  Tensor j =
      jacobian ? torch::stable::new_empty(q, full, *jacobian) : torch::stable::new_empty(q, none);
  void* to = out.mutable_data_ptr();
  void* to_jacobian = jacobian ? j.mutable_data_ptr() : nullptr;
  const QueryAttentionKernels& kernels = query_attention_kernels();
  for_queries(attention, heads, kernels.room(attention, jacobian.has_value(), false),
              [&](int64_t head, int64_t first, int64_t last, void* room) {
                kernels.forward(attention, head, first, last, to, dtype, to_jacobian, room);
              });
  return {out, j};
}

Tensor query_attention_grad_cpu(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                const Tensor& v, const std::optional<Tensor>& mask, double scale) {
  const char* op = "query_attention_grad";
  const Operands x = checked(op, q, k, v, mask, scale);
  const QueryAttention& attention = x.attention;
  const int64_t size[] = {k.size(0), attention.heads, attention.queries, attention.width};
  bool fits = grad_out.dim() == 4 && grad_out.size(3) == attention.value_width &&
              grad_out.scalar_type() == q.scalar_type();
  for (int64_t i = 0; fits && i < 3; ++i) fits = grad_out.size(i) == size[i];
  STD_TORCH_CHECK(fits, op, ": expected grad_out [B, H, T, e] in the dtype of q, got ",
                  describe(grad_out), " for q ", describe(q), " and v ", describe(v));
  const Tensor grads = rows_side_by_side(grad_out);
  const QueryRows grad_rows = rows_of(grads);
  Tensor grad_q = torch::stable::new_empty(q, size);
  void* to = grad_q.mutable_data_ptr();
  const QueryAttentionKernels& kernels = query_attention_kernels();
  for_queries(attention, size[0] * size[1], kernels.room(attention, false, true),
              [&](int64_t head, int64_t first, int64_t last, void* room) {
                kernels.grad(attention, grad_rows, head, first, last, to, room);
              });
  return grad_q;
}

}  // namespace
}  // namespace memtl

STABLE_TORCH_LIBRARY_IMPL(memtl, CPU, m) {
  m.impl("query_attention", TORCH_BOX(&memtl::query_attention_cpu));
  m.impl("query_attention_grad", TORCH_BOX(&memtl::query_attention_grad_cpu));
}
