/* Dot products of many rows of signed bytes with one query of 16-bit integers.
 *
 * rows (n, width) int8, query (width) int16, out (n) int32. The sum of products must fit 32 bits:
 * the caller scales the query so that width * 127 * max|query| < 2^31.
 * Stable ABI (3.11), buffer protocol only: no numpy header is needed to build it. */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

/* the loop is bound by memory once it is vectorised; the better instructions are picked at load */
#if defined(__x86_64__) && defined(__gnu_linux__)
__attribute__((target_clones("avx2", "default")))
#endif
static void
dots(const int8_t *rows, Py_ssize_t n, Py_ssize_t width, const int16_t *query, int32_t *out)
{
    for (Py_ssize_t row = 0; row < n; row++, rows += width) {
        int32_t sum = 0;
        for (Py_ssize_t i = 0; i < width; i++)
            sum += (int32_t)(int16_t)rows[i] * (int32_t)query[i];
        out[row] = sum;
    }
}

static PyObject *scan(PyObject *self, PyObject *args)
{
    Py_buffer rows, query, out;
    Py_ssize_t n, width;
    PyObject *result = NULL;
    (void)self;

    if (!PyArg_ParseTuple(args, "y*y*w*n", &rows, &query, &out, &n))
        return NULL;
    width = query.len / 2;
    if (n < 0 || width < 1 || query.len % 2 || n > rows.len / width || n > out.len / 4) {
        PyErr_SetString(PyExc_ValueError, "rows (n, width) int8, query (width) int16, out (n) int32");
    } else {
        Py_BEGIN_ALLOW_THREADS
        dots(rows.buf, n, width, query.buf, out.buf);
        Py_END_ALLOW_THREADS
        result = Py_None;
        Py_INCREF(result);
    }
    PyBuffer_Release(&rows);
    PyBuffer_Release(&query);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef methods[] = {
    {"scan", scan, METH_VARARGS, "scan(rows, query, out, n): n dot products into out"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_scan", "Dot products of bytes.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__scan(void);
PyMODINIT_FUNC PyInit__scan(void)
{
    return PyModule_Create(&module);
}
