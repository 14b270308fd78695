/* The launch of a compiled kernel on a GPU: what comes from Python, and the call of the driver.
 *
 * A launch from Python takes longer than a small step, so it is done here. No header of CUDA is
 * needed: the driver's function is called by its address, which Python looks up. */

enum { MOST_ARGUMENTS = 48 };

typedef int (*DriverLaunch)(void *function, unsigned x, unsigned y, unsigned z, unsigned threads,
                            unsigned threads_y, unsigned threads_z, unsigned shared, void *stream,
                            void **arguments, void **extra);

PyDoc_STRVAR(launch_doc,
             "launch(driver, function, programs, threads, shared, stream, arguments)\n--\n\n"
             "Launch a kernel, and return what the driver says: 0 if it is under way.\n\n"
             "`driver` is the address of its `cuLaunchKernel`, `function` the handle of the kernel,\n"
             "`arguments` a tuple of integers and floats. Each lies in 64 bits of its own, of which\n"
             "a kernel takes as many as it wants: machines with a GPU store the lowest ones first.\n"
             "Zeros follow, for what a compiler appends.");

static PyObject *launch(PyObject *module, PyObject *const *given, Py_ssize_t count)
{
    (void)module;
    enum { FIXED = 6, APPENDED = 8 };
    int64_t fixed[FIXED], words[MOST_ARGUMENTS + APPENDED] = {0};
    void *arguments[MOST_ARGUMENTS + APPENDED];
    if (count != FIXED + 1 || !PyTuple_Check(given[FIXED])) {
        PyErr_SetString(PyExc_TypeError, "launch takes 6 integers and a tuple of numbers.");
        return NULL;
    }
    const Py_ssize_t length = PyTuple_Size(given[FIXED]);
    if (length > MOST_ARGUMENTS) {
        PyErr_Format(PyExc_ValueError, "arguments: must be at most %d, not %zd.",
                     (int)MOST_ARGUMENTS, length);
        return NULL;
    }
    for (int i = 0; i < FIXED; i++)
        fixed[i] = PyLong_AsLongLong(given[i]);
    for (Py_ssize_t i = 0; i < length; i++) {
        PyObject *own = PyTuple_GetItem(given[FIXED], i);
        if (PyFloat_Check(own)) {
            const double value = PyFloat_AsDouble(own);
            memcpy(&words[i], &value, sizeof(value));
        } else
            words[i] = PyLong_AsLongLong(own);
    }
    if (PyErr_Occurred())
        return NULL;
    for (int i = 0; i < MOST_ARGUMENTS + APPENDED; i++)
        arguments[i] = &words[i];
    DriverLaunch driver;
    void *address = (void *)(intptr_t)fixed[0];
    memcpy(&driver, &address, sizeof(driver));
    int said;
    Py_BEGIN_ALLOW_THREADS
    said = driver((void *)(intptr_t)fixed[1], (unsigned)fixed[2], 1, 1, (unsigned)fixed[3], 1, 1,
                  (unsigned)fixed[4], (void *)(intptr_t)fixed[5], arguments, NULL);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(said);
}
