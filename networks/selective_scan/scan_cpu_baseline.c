/* The scan with what every processor of the architecture has: vectors of four. */
#define ISA baseline
#define VL 4
#define NB 4
#include "scan_cpu_forward.h"
#include "scan_cpu_backward.h"
