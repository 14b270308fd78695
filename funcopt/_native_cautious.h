/* `Cautious` on many leaves: how many elements of each go on, and then what each one comes to. */

/* So many elements of three columns fit into a core's second cache, from one pass to the next. */
enum { CACHED = 1 << 15 };

/* Return by how much more than it moved an element moves that goes on: as torch finds it. */
static double further_of(const Job *job, int64_t agreeing, int64_t size)
{
    if (job->dtypes[0] == FLOAT64)
        return 1.0 / fmax((double)agreeing / (double)size, 1e-3) - 1.0;
    const float share = (float)agreeing / (float)size;
    return (double)(1.0f / fmaxf(share, 1e-3f) - 1.0f);
}

/* Do both passes leaf by leaf, or of some small ones together, so that the second reads the cache. */
static void hold_back_all(Job *job, double *own, int rescales, int64_t threads)
{
    const int64_t most = CACHED * (threads < MOST_THREADS ? threads : MOST_THREADS);
    job->begin = 0;
    for (int64_t leaf = 0; leaf < job->leaves;) {
        const int64_t first = leaf;
        job->total = job->sizes[leaf++];
        while (leaf < job->leaves && job->total + job->sizes[leaf] <= most)
            job->total += job->sizes[leaf++];
        if (rescales) {
            job->rule = COUNT_AGREEING;
            run_on(job, threads);
            for (int64_t moved = first; moved < leaf; moved++)
                if (job->sizes[moved] > 0) {
                    own[LERP_WEIGHT] = further_of(job, job->agreeing[moved], job->sizes[moved]);
                    set_row(job, moved, own);
                }
        }
        job->rule = HOLD_BACK;
        run_on(job, threads);
        job->begin += job->total;
    }
}

PyDoc_STRVAR(hold_back_doc,
             "hold_back(dtype, way, rescales, decay, threads, sizes, addresses)\n--\n\n"
             "Hold back what went against the gradient in an update, and let leaves decay.\n\n"
             "`way` is the sign that an update times the gradient has where it goes on, or 0 for\n"
             "all to go on; `rescales` whether these go further, so that the mean over a leaf stays\n"
             "what it was. `decay` is the share of what shrinks that is taken off, or None.\n"
             "`addresses` has one a leaf for the parameters before the update, the gradients, and\n"
             "the parameters after it, which are written.");

static PyObject *hold_back(PyObject *module, PyObject *const *given, Py_ssize_t count)
{
    (void)module;
    Job job = {.members = 1, .per_leaf = 1, .old_columns = 2, .new_columns = 1, .is_wide = 1};
    int64_t dtype, way, rescales, threads;
    if (count != 7 || !PyList_Check(given[5]) || !PyList_Check(given[6])) {
        PyErr_SetString(PyExc_TypeError, "hold_back takes 5 numbers and 2 lists.");
        return NULL;
    }
    if (take_number(given[0], "dtype", FLOAT32, FLOAT64, &dtype) < 0 ||
        take_number(given[1], "way", -1, 1, &way) < 0 ||
        take_number(given[2], "rescales", 0, 1, &rescales) < 0 ||
        take_number(given[4], "threads", 1, INT64_MAX, &threads) < 0)
        return NULL;
    const double decay = given[3] == Py_None ? 0.0 : PyFloat_AsDouble(given[3]);
    if (PyErr_Occurred())
        return NULL;
    for (int column = 0; column < 2; column++) {
        job.dtypes[column] = (int)dtype;
        job.items[column] = items[dtype];
    }
    job.leaves = PyList_Size(given[5]);
    const size_t leaves = (size_t)job.leaves;
    char *memory = PyMem_Calloc(leaves + 1, COEFFICIENTS * sizeof(double) + 2 * sizeof(int64_t) +
                                                3 * sizeof(char *));
    if (memory == NULL)
        return PyErr_NoMemory();
    int64_t *sizes = (int64_t *)((double *)memory + leaves * COEFFICIENTS);
    char **addresses = (char **)(sizes + 2 * leaves);
    job.agreeing = sizes + leaves;
    job.coefficients = memory;
    PyObject *result = NULL;
    if (take_sizes(given[5], &job, sizes) == 0 && take_addresses(given[6], &job, addresses) == 0) {
        double own[COEFFICIENTS] = {
            [ACTIVE] = 1.0, [WAY] = (double)way, [COUPLED] = given[3] != Py_None, [DECAY] = decay};
        for (int64_t leaf = 0; leaf < job.leaves; leaf++)
            set_row(&job, leaf, own);
        Py_BEGIN_ALLOW_THREADS
        hold_back_all(&job, own, rescales && way != 0, threads);
        Py_END_ALLOW_THREADS
        result = Py_None;
        Py_INCREF(result);
    }
    PyMem_Free(memory);
    return result;
}
