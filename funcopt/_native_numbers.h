/* The coefficients of one member. They are found in double, as torch does, and rounded when they are
 * kept; what is rounded here, torch rounds twice. */

static double rounded(const Job *job, double value)
{
    return job->dtypes[0] == FLOAT64 ? value : (double)(float)value;
}

static void set_grad_factor(const Job *job, double scale, double *own)
{
    const double sign = job->maximize ? -1.0 : 1.0;
    const int is_16_bit = job->items[1] == 2; /* a gradient */
    own[GRAD_FACTOR] = is_16_bit ? sign : sign * scale;
    own[ROUNDED_FACTOR] = is_16_bit ? scale : 1.0;
}

/* Bias corrections, which members mostly share: to find them takes longer than all else here. */
typedef struct {
    double step, beta1, beta2, one, two_root;
} Corrections;

static void set_adam(const Job *job, const double *numbers, double *own, Corrections *last)
{
    const double step = numbers[0], lr = numbers[1], beta1 = numbers[2], beta2 = numbers[3];
    const double weight_decay = numbers[5];
    const double weight = rounded(job, 1 - beta1);
    if (step != last->step || beta1 != last->beta1 || beta2 != last->beta2)
        *last = (Corrections){step, beta1, beta2, 1 - pow(beta1, step), sqrt(1 - pow(beta2, step))};
    own[LERP_FROM_AVERAGE] = weight < 0.5;
    own[LERP_WEIGHT] = weight < 0.5 ? weight : weight - 1;
    own[BETA2] = beta2;
    own[GAIN2] = 1 - beta2;
    own[EPS] = numbers[4];
    own[DECAY] = weight_decay;
    own[COUPLED] = job->rule == ADAM && weight_decay != 0;
    own[REMAINDER] = job->rule == ADAM ? 1.0 : 1 - lr * weight_decay;
    own[DESCENT] = -(lr / last->one);
    own[CORRECTION2_ROOT] = last->two_root;
    set_grad_factor(job, numbers[8], own);
}

static void set_sgd(const Job *job, const double *numbers, double *own, Corrections *last)
{
    (void)last;
    const double dampening = numbers[0] == 1 ? 0.0 : numbers[3];
    own[DESCENT] = -numbers[1];
    own[MOMENTUM] = numbers[2];
    own[GAIN] = 1 - dampening;
    own[DECAY] = numbers[4];
    own[COUPLED] = numbers[4] != 0;
    set_grad_factor(job, numbers[7], own);
}

static void set_lion(const Job *job, const double *numbers, double *own, Corrections *last)
{
    (void)last;
    own[DESCENT] = -numbers[1];
    own[BETA1] = numbers[2];
    own[BETA2] = numbers[3];
    own[GAIN1] = 1 - numbers[2];
    own[GAIN2] = 1 - numbers[3];
    own[DECAY] = numbers[4];
    own[COUPLED] = 0;
    set_grad_factor(job, numbers[7], own);
}
