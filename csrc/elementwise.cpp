#include "elementwise.h"

#include <algorithm>

namespace fastffn {

bool Elementwise::in_double() const {
  return std::any_of(operands, operands + count(),
                     [](const Operand& o) { return o.dtype == DType::kFloat64; });
}

void Elementwise::coalesce() {
  int order[kMaxDims];
  int kept = 0;
  for (int d = 0; d < dims; ++d) {
    if (size[d] != 1) order[kept++] = d;
  }
  const Operand& lead = operands[code->inputs];
  std::stable_sort(order, order + kept,
                   [&](int a, int b) { return lead.stride[a] > lead.stride[b]; });

  const Elementwise before = *this;
  dims = 0;
  for (int i = 0; i < kept; ++i) {
    const int d = order[i];
    bool merge = dims > 0;
    for (int k = 0; merge && k < count(); ++k) {
      merge = operands[k].stride[dims - 1] == before.operands[k].stride[d] * before.size[d];
    }
    if (merge) {
      size[dims - 1] *= before.size[d];
    } else {
      size[dims++] = before.size[d];
    }
    for (int k = 0; k < count(); ++k) operands[k].stride[dims - 1] = before.operands[k].stride[d];
  }
  if (dims == 0) {  // one element
    dims = 1;
    size[0] = 1;
  }
}

}  // namespace fastffn
