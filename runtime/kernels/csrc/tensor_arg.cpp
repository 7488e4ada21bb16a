#include "tensor_arg.h"

namespace hotneuron {
namespace {

// The part of dlpack.h 1.3 that the exchange API needs; nanobind's copy does not export it.
struct DlDevice {
  int32_t type, id;
};
struct DlDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* py_object, DlTensor* out);
  void* current_work_stream;
};

constexpr int kCpu = 1;
constexpr int kCodeInt = 0, kCodeUint = 1, kCodeFloat = 2, kCodeBfloat = 4, kCodeBool = 6;

const DlExchangeApi* find_exchange_api(PyTypeObject* type) {
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  const void* api = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  Py_XDECREF(capsule);
  PyErr_Clear();
  const auto* typed = static_cast<const DlExchangeApi*>(api);
  return typed && typed->version.major == 1 && typed->tensor_from_py_object ? typed : nullptr;
}

// The answer for the last type seen; tensors of one type are nearly all there are. Guarded by the
// GIL; the type is kept alive so that its address stays its own.
const DlExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;
  static const DlExchangeApi* last_api = nullptr;
  if (type != last_type) {
    last_api = find_exchange_api(type);
    Py_INCREF(type);
    Py_XDECREF(last_type);
    last_type = type;
  }
  return last_api;
}

Element element_of(int code, int bits, int lanes) {
  if (lanes != 1) return Element::other;
  if (code == kCodeFloat && bits == 32) return Element::f32;
  if (code == kCodeBfloat && bits == 16) return Element::bf16;
  if (code == kCodeFloat && bits == 16) return Element::f16;
  if (code == kCodeInt && bits == 8) return Element::i8;
  if (code == kCodeUint && bits == 8) return Element::u8;
  if (code == kCodeInt && bits == 64) return Element::i64;
  if (code == kCodeBool && bits == 8) return Element::boolean;
  return Element::other;
}

std::string type_name(int code, int bits) {
  static const char* const kNames[] = {"int", "uint", "float", "", "bfloat", "complex", "bool"};
  const bool is_known = code >= 0 && code < 7 && code != 3;
  return (is_known ? kNames[code] : "type") + (code == kCodeBool ? "" : std::to_string(bits));
}

const char* name_of(Element element) {
  switch (element) {
    case Element::f32: return "float32";
    case Element::bf16: return "bfloat16";
    case Element::f16: return "float16";
    case Element::i8: return "int8";
    case Element::u8: return "uint8";
    case Element::i64: return "int64";
    case Element::boolean: return "bool";
    case Element::other: break;
  }
  return "?";
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += size < 0 ? "any" : std::to_string(size);
  }
  return text + "]";
}

}  // namespace

TensorArg::TensorArg(nb::handle tensor, const char* name, Layout layout) : name_(name) {
  if (const DlExchangeApi* api = exchange_api(Py_TYPE(tensor.ptr()))) {
    DlTensor t;
    if (api->tensor_from_py_object(tensor.ptr(), &t) != 0) {
      PyErr_Clear();  // it names no argument
      throw nb::value_error((std::string(name) + " must be a dense tensor on the CPU.").c_str());
    }
    read(t.data, static_cast<int64_t>(t.byte_offset), t.device.type, t.dtype.code, t.dtype.bits,
         t.dtype.lanes, t.ndim, t.shape, t.strides, layout);
    return;
  }
  nb::ndarray<> array;
  if (!nb::try_cast(tensor, array)) {
    throw nb::value_error((std::string(name) + " must be a tensor.").c_str());
  }
  std::vector<int64_t> shape, strides;
  for (size_t i = 0; i < array.ndim(); ++i) {
    shape.push_back(static_cast<int64_t>(array.shape(i)));
    strides.push_back(array.stride(i));
  }
  const nb::dlpack::dtype dtype = array.dtype();
  read(array.data(), 0, array.device_type(), dtype.code, dtype.bits, dtype.lanes,
       static_cast<int>(shape.size()), shape.data(), strides.data(), layout);
}

void TensorArg::read(void* data, int64_t byte_offset, int device, int code, int bits, int lanes,
                     int ndim, const int64_t* shape, const int64_t* strides, Layout layout) {
  data_ = static_cast<char*>(data) + byte_offset;
  element_ = element_of(code, bits, lanes);
  type_name_ = type_name(code, bits);
  shape_.assign(shape, shape + ndim);
  if (device != kCpu) fail("on the CPU");
  int64_t step = 1;
  for (int dim = ndim - 1; dim >= 0; --dim) {
    const bool is_given = strides && shape[dim] > 1;
    if (ndim == 2 && dim == 0) row_stride_ = is_given ? strides[dim] : step;
    const bool may_be_apart = layout == Layout::rows_apart && ndim == 2 && dim == 0;
    if (is_given && (may_be_apart ? strides[dim] < step : strides[dim] != step)) {
      fail(may_be_apart ? "rows that do not overlap" : "contiguous (call .contiguous())");
    }
    step *= shape[dim];
  }
}

const TensorArg& TensorArg::shaped(std::initializer_list<int64_t> expected) const {
  bool fits = expected.size() == shape_.size();
  size_t dim = 0;
  for (const int64_t size : expected) {
    fits = fits && (size < 0 || shape_[dim] == size);
    ++dim;
  }
  if (!fits) fail("of shape " + shape_text(expected));
  return *this;
}

const TensorArg& TensorArg::of(std::initializer_list<Element> expected) const {
  std::string names;
  for (const Element element : expected) {
    if (element == element_) return *this;
    names += names.empty() ? name_of(element) : std::string(" or ") + name_of(element);
  }
  fail(names);
}

DType TensorArg::dtype() const {
  switch (element_) {
    case Element::f32: return DType::f32;
    case Element::bf16: return DType::bf16;
    case Element::i8: return DType::i8;
    default: fail("float32, bfloat16 or int8");
  }
}

void TensorArg::fail(const std::string& expected) const {
  const std::string text = std::string(name_) + " must be " + expected + "; it is " + type_name_ +
                           " of shape " + shape_text(shape_) + ".";
  throw nb::value_error(text.c_str());
}

}  // namespace hotneuron
