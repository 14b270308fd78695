/* The step of many leaves on the CPU, out of place or in place, in one pass over their memory.
 *
 * `step` is given addresses and sizes. It checks all that can be checked of them before anything is
 * read or written, lets go of Python's lock, and moves the leaves on as many threads as are worth
 * their start. What it does to an element is written in `_native_steps.h`, how that is spread over
 * vectors and threads in `_native_run.h`.
 *
 * It needs no header of torch, and of Python the limited API alone, so that one build serves every
 * Python from 3.11 on and every torch.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_native_job.h"
#include "_native_run.h"

/* The coefficients of one member. They are found in double, as torch does, and rounded once. */

static double rounded(const Job *job, double value)
{
    return job->dtype == FLOAT64 ? value : (double)(float)value;
}

static void set_grad_factor(const Job *job, double scale, double *own)
{
    const double sign = job->maximize ? -1.0 : 1.0;
    const int is_16_bit = job->item == 2;
    own[GRAD_FACTOR] = is_16_bit ? sign : sign * rounded(job, scale);
    own[ROUNDED_FACTOR] = is_16_bit ? rounded(job, scale) : 1.0;
}

static void set_adam(const Job *job, const double *numbers, double *own)
{
    const double step = numbers[0], lr = numbers[1], beta1 = numbers[2], beta2 = numbers[3];
    const double weight_decay = numbers[5];
    const double weight = rounded(job, 1 - beta1);
    own[LERP_FROM_AVERAGE] = weight < 0.5;
    own[LERP_WEIGHT] = weight < 0.5 ? weight : rounded(job, weight - 1);
    own[BETA2] = rounded(job, beta2);
    own[GAIN2] = rounded(job, 1 - beta2);
    own[EPS] = rounded(job, numbers[4]);
    own[DECAY] = rounded(job, weight_decay);
    own[COUPLED] = job->rule == ADAM && weight_decay != 0;
    own[REMAINDER] = job->rule == ADAM ? 1.0 : rounded(job, 1 - lr * weight_decay);
    own[DESCENT] = rounded(job, -(lr / (1 - pow(beta1, step))));
    own[CORRECTION2_ROOT] = rounded(job, sqrt(1 - pow(beta2, step)));
    set_grad_factor(job, numbers[6], own);
}

static void set_sgd(const Job *job, const double *numbers, double *own)
{
    const double dampening = numbers[0] == 1 ? 0.0 : numbers[3];
    own[DESCENT] = rounded(job, -numbers[1]);
    own[MOMENTUM] = rounded(job, numbers[2]);
    own[GAIN] = rounded(job, 1 - dampening);
    own[DECAY] = rounded(job, numbers[4]);
    own[COUPLED] = numbers[4] != 0;
    set_grad_factor(job, numbers[5], own);
}

static void set_lion(const Job *job, const double *numbers, double *own)
{
    own[DESCENT] = rounded(job, -numbers[1]);
    own[BETA1] = rounded(job, numbers[2]);
    own[BETA2] = rounded(job, numbers[3]);
    own[GAIN1] = rounded(job, 1 - numbers[2]);
    own[GAIN2] = rounded(job, 1 - numbers[3]);
    own[DECAY] = rounded(job, numbers[4]);
    own[COUPLED] = 0;
    set_grad_factor(job, numbers[5], own);
}

static const struct {
    int fewest_olds, most_olds, numbers;
    void (*set)(const Job *, const double *, double *);
} rules[] = {
    [ADAM] = {4, 5, 7, set_adam},
    [ADAMW] = {4, 5, 7, set_adam},
    [SGD] = {2, 3, 6, set_sgd},
    [LION] = {3, 3, 6, set_lion},
};
enum { RULES = sizeof(rules) / sizeof(rules[0]) };

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

/* Take the address of a column of a leaf, which must be able to hold what is said of it. */
static int take_address(PyObject *given, const Job *job, int64_t size, char **address)
{
    const unsigned long long number = PyLong_AsUnsignedLongLong(given);
    if (number == (unsigned long long)-1 && PyErr_Occurred())
        return -1;
    *address = (char *)(uintptr_t)number;
    if (size == 0)
        return 0;
    if (number == 0 || number % job->item != 0 || number > UINTPTR_MAX ||
        (unsigned long long)(size * job->item) > UINTPTR_MAX - number) {
        PyErr_Format(PyExc_ValueError,
                     "address=%llu: must be that of %lld elements, at a multiple of %lld.", number,
                     (long long)size, (long long)job->item);
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
        const int64_t size = job->sizes[i % job->leaves];
        if (take_address(PyList_GetItem(given, i), job, size, &addresses[i]) < 0)
            return -1;
    }
    for (int64_t i = count; i < olds + news; i++) {
        const int64_t place = i - olds; /* the gradients are read and not written */
        addresses[i] = addresses[place < job->leaves ? place : place + job->leaves];
    }
    job->addresses = addresses;
    return 0;
}

/* Take one number, or one for each member, into every so many doubles. */
static int take_values(PyObject *given, int64_t members, int64_t stride, double *values)
{
    if (PyFloat_Check(given)) {
        for (int64_t member = 0; member < members; member++)
            values[member * stride] = PyFloat_AsDouble(given);
        return 0;
    }
    if (!PyList_Check(given) || PyList_Size(given) != members) {
        PyErr_Format(PyExc_TypeError, "numbers: must be floats, or lists of %lld, not %R.",
                     (long long)members, given);
        return -1;
    }
    for (int64_t member = 0; member < members; member++) {
        const double value = PyFloat_AsDouble(PyList_GetItem(given, member));
        if (value == -1.0 && PyErr_Occurred())
            return -1;
        values[member * stride] = value;
    }
    return 0;
}

static int take_numbers(PyObject *given, Job *job, double *numbers, double *coefficients)
{
    const int64_t wanted = rules[job->rule].numbers;
    if (PyTuple_Size(given) != wanted) {
        PyErr_Format(PyExc_ValueError, "numbers: must be %lld, not %lld.", (long long)wanted,
                     (long long)PyTuple_Size(given));
        return -1;
    }
    for (int64_t i = 0; i < wanted; i++)
        if (take_values(PyTuple_GetItem(given, i), job->members, wanted, &numbers[i]) < 0)
            return -1;
    for (int64_t member = 0; member < job->members; member++)
        rules[job->rule].set(job, numbers + member * wanted, coefficients + member * COEFFICIENTS);
    job->coefficients = coefficients;
    return 0;
}

/* Take what is said of all leaves together. */
static int take_kind(PyObject *const *given, Job *job, int64_t *threads)
{
    int64_t rule, dtype, columns, maximize, nesterov;
    if (take_number(given[0], "rule", 0, RULES - 1, &rule) < 0 ||
        take_number(given[1], "dtype", 0, DTYPES - 1, &dtype) < 0 ||
        take_number(given[2], "columns", rules[rule].fewest_olds, rules[rule].most_olds,
                    &columns) < 0 ||
        take_number(given[3], "maximize", 0, 1, &maximize) < 0 ||
        take_number(given[4], "nesterov", 0, 1, &nesterov) < 0 ||
        take_number(given[5], "members", 1, MOST_MEMBERS, &job->members) < 0 ||
        take_number(given[6], "threads", 1, INT64_MAX, threads) < 0)
        return -1;
    job->rule = (int)rule;
    job->dtype = (int)dtype;
    job->old_columns = (int)columns;
    job->new_columns = (int)columns - 1;
    job->maximize = (int)maximize;
    job->nesterov = (int)nesterov;
    job->item = items[dtype];
    return 0;
}

static PyObject *run_job(PyObject *const *given, Job *job, int64_t threads)
{
    const size_t columns = (size_t)(job->old_columns + job->new_columns);
    const size_t leaves = (size_t)job->leaves, members = (size_t)job->members;
    const size_t numbers = members * (size_t)rules[job->rule].numbers;
    const size_t bytes = leaves * (columns * sizeof(char *) + sizeof(int64_t)) +
                         (members * COEFFICIENTS + numbers) * sizeof(double);
    char *memory = PyMem_Malloc(bytes);
    if (memory == NULL)
        return PyErr_NoMemory();
    double *coefficients = (double *)memory;
    double *values = coefficients + members * COEFFICIENTS;
    int64_t *sizes = (int64_t *)(values + numbers);
    char **addresses = (char **)(sizes + leaves);

    PyObject *result = NULL;
    if (take_sizes(given[7], job, sizes) == 0 && take_addresses(given[8], job, addresses) == 0 &&
        take_numbers(given[9], job, values, coefficients) == 0) {
        job->streams = job->total * job->item * job->new_columns > BEYOND_CACHE;
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
             "step(rule, dtype, columns, maximize, nesterov, members, threads, sizes, addresses, "
             "numbers)\n--\n\n"
             "Move leaves by one step.\n\n"
             "`columns` of tensors are read: parameters, gradients and slots. `sizes` has the\n"
             "elements of each leaf, all of its `members` together, which lie one after another.\n"
             "`addresses` has for each column one address a leaf: of what is read, and after these\n"
             "of what is written, unless that is the same. `numbers` are the count of updates, the\n"
             "hyperparameters of the rule and the scale of the gradients: each a float, or a list\n"
             "of one for each member. Nothing is read or written if any of it cannot be.\n\n"
             "Memory must not overlap but where it is the same, and must hold so many elements.");

static PyObject *step(PyObject *module, PyObject *const *given, Py_ssize_t count)
{
    (void)module;
    Job job = {0};
    int64_t threads;
    if (count != 10) {
        PyErr_Format(PyExc_TypeError, "step takes 10 arguments, not %zd.", count);
        return NULL;
    }
    if (!PyList_Check(given[7]) || !PyList_Check(given[8]) || !PyTuple_Check(given[9])) {
        PyErr_SetString(PyExc_TypeError, "sizes and addresses: must be lists, numbers a tuple.");
        return NULL;
    }
    if (take_kind(given, &job, &threads) < 0)
        return NULL;
    job.leaves = PyList_Size(given[7]);
    return run_job(given, &job, threads);
}

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

#include "_native_launch.h"

static int start(PyObject *module)
{
    (void)module;
    chosen = 0;
    while (!instruction_sets[chosen].is_there())
        chosen++;
    return 0;
}

static PyMethodDef methods[] = {
    {"step", (PyCFunction)(void (*)(void))step, METH_FASTCALL, step_doc},
    {"instructions", instructions, METH_NOARGS, instructions_doc},
    {"use", use, METH_O, use_doc},
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
