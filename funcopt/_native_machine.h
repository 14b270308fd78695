/* What Python asks of this machine and chooses: the instruction set, and whose threads run. */

PyDoc_STRVAR(instructions_doc,
             "instructions()\n--\n\n"
             "Return the instruction sets that this processor has, best first: pairs of a name and\n"
             "whether it has what makes a step fast. The first one is in use, unless `use` chose.");

static PyObject *instructions(PyObject *module, PyObject *nothing)
{
    (void)module, (void)nothing;
    PyObject *found = PyList_New(0);
    for (int i = 0; found != NULL && i < INSTRUCTION_SETS; i++) {
        if (!instruction_sets[i].is_there())
            continue;
        PyObject *pair = Py_BuildValue("(sN)", instruction_sets[i].name,
                                       PyBool_FromLong(instruction_sets[i].is_fast));
        if (pair == NULL || PyList_Append(found, pair) < 0)
            Py_CLEAR(found);
        Py_XDECREF(pair);
    }
    return found;
}

PyDoc_STRVAR(use_doc, "use(name)\n--\n\n"
                      "Use the instruction set of this name from now on. Results do not depend on "
                      "it.");

static PyObject *use(PyObject *module, PyObject *given)
{
    (void)module;
    PyObject *text = PyUnicode_AsUTF8String(given);
    if (text == NULL)
        return NULL;
    const char *name = PyBytes_AsString(text);
    int found = -1;
    for (int i = 0; i < INSTRUCTION_SETS; i++)
        if (strcmp(name, instruction_sets[i].name) == 0 && instruction_sets[i].is_there())
            found = i;
    Py_DECREF(text);
    if (found < 0) {
        PyErr_Format(PyExc_ValueError, "%R: this processor has no such instruction set.", given);
        return NULL;
    }
    chosen = found;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(take_threads_doc,
             "take_threads(run, number, count)\n--\n\n"
             "Run on the threads of an OpenMP, by the addresses of its functions `GOMP_parallel`,\n"
             "`omp_get_thread_num` and `omp_get_num_threads`; without any, on threads of our own.");

static PyObject *take_threads(PyObject *module, PyObject *const *given, Py_ssize_t count)
{
    (void)module;
    void *found[3] = {NULL, NULL, NULL};
    if (count != 0 && count != 3) {
        PyErr_Format(PyExc_TypeError, "take_threads takes 3 addresses or none, not %zd.", count);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        found[i] = PyLong_AsVoidPtr(given[i]);
        if (PyErr_Occurred())
            return NULL;
    }
    memcpy(&team.run, &found[0], sizeof(void *));
    memcpy(&team.number, &found[1], sizeof(void *));
    memcpy(&team.count, &found[2], sizeof(void *));
    Py_RETURN_NONE;
}
