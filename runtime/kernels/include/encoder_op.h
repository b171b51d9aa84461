#pragma once

#include "ort_operator.h"

namespace convllava {

extern const ort::CustomOp ENCODER_OPERATORS[4];

}  // namespace convllava
