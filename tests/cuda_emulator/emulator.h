// What the emulator's Python module asks of it.
#pragma once

namespace emulator {

// Whether the last thread of a block runs first.
void set_reverse_order(bool reverse);

}  // namespace emulator
