/* The step of many leaves on the CPU, out of place or in place, in one pass over their memory.
 *
 * `step` is given addresses and sizes. It checks all that can be checked of them before anything is
 * read or written, lets go of Python's lock, and moves the leaves on as many threads as are worth
 * their start. What it does to an element is written in `_native_steps.h`, how that is spread over
 * vectors and threads in `_native_run.h`. Beside it are products of matrices for Muon, of which the
 * loops are in `_native_tiles.h`, and the launch of kernels on a GPU.
 *
 * It needs no header of torch, and of Python the limited API alone, so that one build serves every
 * Python from 3.11 on and every torch.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_native_job.h"
#include "_native_round.h"
#include "_native_run.h"
#include "_native_tiles.h"
#include "_native_numbers.h"

static const struct {
    int fewest_olds, most_olds, numbers;
    void (*set)(const Job *, const double *, double *, Corrections *);
} rules[] = {
    [ADAM] = {4, 5, 9, set_adam},
    [ADAMW] = {4, 5, 9, set_adam},
    [SGD] = {2, 3, 8, set_sgd},
    [LION] = {3, 3, 8, set_lion},
};
enum { RULES = sizeof(rules) / sizeof(rules[0]), MOST_NUMBERS = 9 };

static const int64_t items[] = {[FLOAT32] = 4, [FLOAT64] = 8, [BFLOAT16] = 2, [FLOAT16] = 2};
enum { DTYPES = sizeof(items) / sizeof(items[0]) };

/* What Python hands over, checked. Each returns 0, or -1 with an exception set. */

/* Take a whole number within a range. */
static int take_number(PyObject *given, const char *name, int64_t least, int64_t most,
                       int64_t *number)
{
    *number = PyLong_AsLongLong(given);
    if (*number == -1 && PyErr_Occurred())
        return -1;
    if (*number >= least && *number <= most)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s=%lld: must be at least %lld and at most %lld.", name,
                 (long long)*number, (long long)least, (long long)most);
    return -1;
}

static int take_sizes(PyObject *given, Job *job, int64_t *sizes)
{
    const int64_t most = INT64_MAX / 64; /* so that no sum of bytes overflows */
    job->total = 0;
    for (int64_t leaf = 0; leaf < job->leaves; leaf++) {
        if (take_number(PyList_GetItem(given, leaf), "size", 0, most, &sizes[leaf]) < 0)
            return -1;
        if (sizes[leaf] % job->members != 0) {
            PyErr_Format(PyExc_ValueError, "size=%lld: must be a multiple of members=%lld.",
                         (long long)sizes[leaf], (long long)job->members);
            return -1;
        }
        if (sizes[leaf] > most - job->total) {
            PyErr_SetString(PyExc_OverflowError, "sizes: more elements than memory can hold.");
            return -1;
        }
        job->total += sizes[leaf];
    }
    job->sizes = sizes;
    return 0;
}

/* Take which leaf of the whole tree each is; where nothing is said, they are all. */
static int take_ids(PyObject *given, Job *job, int64_t *ids)
{
    const int are_all = given == Py_None;
    if (!are_all && (!PyList_Check(given) || PyList_Size(given) != job->leaves)) {
        PyErr_Format(PyExc_TypeError, "ids: must be None, or a list of %lld.",
                     (long long)job->leaves);
        return -1;
    }
    for (int64_t leaf = 0; leaf < job->leaves; leaf++) {
        ids[leaf] = leaf;
        if (!are_all && take_number(PyList_GetItem(given, leaf), "id", 0, INT32_MAX, &ids[leaf]) < 0)
            return -1;
    }
    job->ids = ids;
    return 0;
}

/* Take the address of a column of a leaf, which must be able to hold what is said of it. */
static int take_address(PyObject *given, int64_t item, int64_t size, char **address)
{
    const unsigned long long number = PyLong_AsUnsignedLongLong(given);
    if (number == (unsigned long long)-1 && PyErr_Occurred())
        return -1;
    *address = (char *)(uintptr_t)number;
    if (size == 0)
        return 0;
    if (number == 0 || number % item != 0 || number > UINTPTR_MAX ||
        (unsigned long long)(size * item) > UINTPTR_MAX - number) {
        PyErr_Format(PyExc_ValueError,
                     "address=%llu: must be that of %lld elements, at a multiple of %lld.", number,
                     (long long)size, (long long)item);
        return -1;
    }
    return 0;
}

/* In place, the addresses of what is written are among those of what is read. */
static int take_addresses(PyObject *given, Job *job, char **addresses)
{
    const int64_t olds = job->old_columns * job->leaves, news = job->new_columns * job->leaves;
    const int64_t count = PyList_Size(given);
    if (count != olds && count != olds + news) {
        PyErr_Format(PyExc_ValueError, "addresses: must be %lld in place, else %lld, not %lld.",
                     (long long)olds, (long long)(olds + news), (long long)count);
        return -1;
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t size = job->sizes[i % job->leaves], column = i / job->leaves;
        const int old = (int)(i < olds ? column : old_of((int)(column - job->old_columns)));
        if (take_address(PyList_GetItem(given, i), job->items[old], size, &addresses[i]) < 0)
            return -1;
    }
    for (int64_t i = count; i < olds + news; i++) {
        const int64_t place = i - olds; /* the gradients are read and not written */
        addresses[i] = addresses[place < job->leaves ? place : place + job->leaves];
    }
    job->addresses = addresses;
    return 0;
}

/* Numbers of which some are the same in all rows, and others of each row, in memory of Python's. */
typedef struct {
    double same[MOST_NUMBERS];
    int64_t others, places[MOST_NUMBERS];
    const double *values[MOST_NUMBERS];
} Numbers;

static int take_number_of_rows(PyObject *given, int64_t rows, int64_t place, Numbers *numbers)
{
    char *address;
    if (PyFloat_Check(given)) {
        numbers->same[place] = PyFloat_AsDouble(given);
        return 0;
    }
    if (take_address(given, sizeof(double), rows, &address) < 0)
        return -1;
    numbers->places[numbers->others] = place;
    numbers->values[numbers->others++] = (const double *)address;
    return 0;
}

/* A key or a count, which are whole and far below 2**64, or mean nothing. */
static uint64_t whole_number(double value)
{
    return value >= 0 && value < 0x1p53 ? (uint64_t)value : 0;
}

static int take_numbers(PyObject *given, Job *job, uint64_t *keys)
{
    Numbers taken = {0};
    double *const numbers = taken.same, own[COEFFICIENTS] = {0};
    const int64_t wanted = rules[job->rule].numbers;
    if (PyTuple_Size(given) != wanted) {
        PyErr_Format(PyExc_ValueError, "numbers: must be %lld, not %lld.", (long long)wanted,
                     (long long)PyTuple_Size(given));
        return -1;
    }
    for (int64_t i = 0; i < wanted; i++)
        if (take_number_of_rows(PyTuple_GetItem(given, i), rows_of(job), i, &taken) < 0)
            return -1;
    Corrections last = {0}; /* of a count of 0, which no update has */
    for (int64_t row = 0; row < rows_of(job); row++) {
        for (int64_t i = 0; i < taken.others; i++)
            numbers[taken.places[i]] = taken.values[i][row];
        own[ACTIVE] = numbers[wanted - 2];
        /* One that is not active moves nothing, and has another count than those that go on. */
        if (own[ACTIVE] != 0.0)
            rules[job->rule].set(job, numbers, own, &last);
        set_row(job, row, own);
        keys[2 * row] = whole_number(numbers[wanted - 3]);
        keys[2 * row + 1] = whole_number(numbers[0]);
    }
    job->keys = keys;
    return 0;
}

/* Take what is said of all leaves together. */
static int take_kind(PyObject *const *given, Job *job, int64_t *threads)
{
    int64_t rule, dtype, slot_dtype, rounding, columns, maximize, nesterov;
    if (take_number(given[0], "rule", 0, RULES - 1, &rule) < 0 ||
        take_number(given[1], "dtype", 0, DTYPES - 1, &dtype) < 0 ||
        take_number(given[2], "slot_dtype", 0, DTYPES - 1, &slot_dtype) < 0 ||
        take_number(given[3], "rounding", NEAREST, COMPENSATED, &rounding) < 0)
        return -1;
    const int is_compensated = rounding == COMPENSATED;
    if (take_number(given[4], "columns", rules[rule].fewest_olds + is_compensated,
                    rules[rule].most_olds + is_compensated, &columns) < 0 ||
        take_number(given[5], "maximize", 0, 1, &maximize) < 0 ||
        take_number(given[6], "nesterov", 0, 1, &nesterov) < 0 ||
        take_number(given[7], "members", 0, MOST_MEMBERS, &job->members) < 0 ||
        take_number(given[8], "threads", 1, INT64_MAX, threads) < 0)
        return -1;
    if ((dtype == FLOAT64) != (slot_dtype == FLOAT64) || (is_compensated && items[dtype] != 2)) {
        PyErr_SetString(PyExc_ValueError, "dtypes: float64 must be both, and parameters with a "
                                          "compensation must have 16 bits.");
        return -1;
    }
    job->per_leaf = job->members == 0;
    job->members += job->per_leaf;
    job->rule = (int)rule;
    job->rounding = (int)rounding;
    job->old_columns = (int)columns;
    job->new_columns = (int)columns - 1;
    job->slots = (int)columns - 2 - is_compensated;
    job->maximize = (int)maximize;
    job->nesterov = (int)nesterov;
    job->is_wide = 1;
    for (int column = 0; column < job->old_columns; column++) {
        const int is_slot = column >= 2 && column < 2 + job->slots;
        job->dtypes[column] = (int)(is_slot ? slot_dtype : dtype);
        job->items[column] = items[job->dtypes[column]];
        job->is_wide &= job->items[column] != 2;
    }
    if (rule <= ADAMW && dtype != FLOAT16 && slot_dtype != FLOAT16)
        job->shorts = (dtype == BFLOAT16 ? SHORT_PARAMS : 0) | (is_compensated ? LOST : 0) |
                      (slot_dtype == BFLOAT16 ? SHORT_SLOTS : 0);
    job->shorts |= job->shorts && rounding == STOCHASTIC ? BY_CHANCE : 0;
    return 0;
}

static PyObject *run_job(PyObject *const *given, Job *job, int64_t threads)
{
    const size_t columns = (size_t)(job->old_columns + job->new_columns);
    const size_t leaves = (size_t)job->leaves, rows = (size_t)rows_of(job);
    const size_t bytes = leaves * (columns * sizeof(char *) + 2 * sizeof(int64_t)) +
                         rows * (COEFFICIENTS + 2) * sizeof(double);
    char *memory = PyMem_Malloc(bytes);
    if (memory == NULL)
        return PyErr_NoMemory();
    uint64_t *keys = (uint64_t *)((double *)memory + rows * COEFFICIENTS);
    job->coefficients = memory;
    int64_t *sizes = (int64_t *)(keys + 2 * rows);
    int64_t *ids = sizes + leaves;
    char **addresses = (char **)(ids + leaves);

    PyObject *result = NULL;
    if (take_sizes(given[9], job, sizes) == 0 && take_ids(given[10], job, ids) == 0 &&
        take_addresses(given[11], job, addresses) == 0 &&
        take_numbers(given[12], job, keys) == 0) {
        job->streams = job->total * job->items[0] * job->new_columns > BEYOND_CACHE;
        Py_BEGIN_ALLOW_THREADS
        run_on(job, threads);
        Py_END_ALLOW_THREADS
        result = Py_None;
        Py_INCREF(result);
    }
    PyMem_Free(memory);
    return result;
}

PyDoc_STRVAR(step_doc,
             "step(rule, dtype, slot_dtype, rounding, columns, maximize, nesterov, members, "
             "threads, sizes, ids, addresses, numbers)\n--\n\n"
             "Move leaves by one step.\n\n"
             "`columns` of tensors are read: parameters, gradients and slots, and with a rounding\n"
             "of 2 what was lost of the parameters when they were rounded. `sizes` has the\n"
             "elements of each leaf, all of its `members` together, which lie one after another.\n"
             "`ids` says which leaf of the tree each is, for the random bits of a rounding of 1.\n"
             "`addresses` has for each column one address a leaf: of what is read, and after these\n"
             "of what is written, unless that is the same. `numbers` are the count of updates, the\n"
             "hyperparameters of the rule, the key of random bits, 0 for a member that stays as it\n"
             "is, and the scale of the gradients: each a float, or the address of a double for each\n"
             "member, or for each leaf if `members` is 0. Nothing is read or written if any of it\n"
             "cannot be.\n\n"
             "Memory must not overlap but where it is the same, and must hold so many elements.");

static PyObject *step(PyObject *module, PyObject *const *given, Py_ssize_t count)
{
    (void)module;
    Job job = {0};
    int64_t threads;
    if (count != 13) {
        PyErr_Format(PyExc_TypeError, "step takes 13 arguments, not %zd.", count);
        return NULL;
    }
    if (!PyList_Check(given[9]) || !PyList_Check(given[11]) || !PyTuple_Check(given[12])) {
        PyErr_SetString(PyExc_TypeError, "sizes and addresses: must be lists, numbers a tuple.");
        return NULL;
    }
    if (take_kind(given, &job, &threads) < 0)
        return NULL;
    job.leaves = PyList_Size(given[9]);
    return run_job(given, &job, threads);
}

#include "_native_cautious.h"
#include "_native_launch.h"
#include "_native_machine.h"
#include "_native_products.h"

static int start(PyObject *module)
{
    (void)module;
    chosen = 0;
    while (!instruction_sets[chosen].is_there())
        chosen++;
#if TILES
    find_tiles();
#endif
    return 0;
}

static PyMethodDef methods[] = {
    {"step", (PyCFunction)(void (*)(void))step, METH_FASTCALL, step_doc},
    {"hold_back", (PyCFunction)(void (*)(void))hold_back, METH_FASTCALL, hold_back_doc},
    {"instructions", instructions, METH_NOARGS, instructions_doc},
    {"use", use, METH_O, use_doc},
    {"has_products", has_products, METH_NOARGS, has_products_doc},
    {"products", products, METH_NOARGS, products_doc},
    {"use_products", use_products, METH_O, use_products_doc},
    {"product", (PyCFunction)(void (*)(void))product, METH_FASTCALL, product_doc},
    {"launch", (PyCFunction)(void (*)(void))launch, METH_FASTCALL, launch_doc},
    {"take_threads", (PyCFunction)(void (*)(void))take_threads, METH_FASTCALL, take_threads_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)start},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "funcopt._native",
    .m_doc = "The step of many leaves on the CPU, in one pass over their memory.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
