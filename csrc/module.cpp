// An empty Python module: importing it loads this library, whose files register their ops with torch as they load.
// Limited API, so that one binary serves every Python from 3.11 on.
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&module_definition); }
