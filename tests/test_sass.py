"""What is read from machine code, against a listing whose loop is counted by hand."""

from benchmarks import sass
from stablelm_jax.planning.targets import chips

# A loop over heads around one over tiles; a tile is masked if P1 does not jump over two lines.
LISTING = """
kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_9:
        /*0010*/                   MOV R2, R1 ;
.L_x_1:
        /*0020*/                   DEPBAR.LE SB0, 0x2 ;
        /*0030*/                   LDSM.16.M88.4 R4, [R3] ;
        /*0040*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0050*/                   HMMA.16816.F32.BF16 R28, R4, R9, R28 ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/                   FSETP.GEU.AND P2, PT, R24, R25, PT ;
        /*0080*/                   FSEL R24, R24, RZ, P2 ;
.L_x_2:
        /*0090*/                   FFMA.FTZ R24, R24, R10, R11 ;
        /*00a0*/                   MUFU.EX2 R24, R24 ;
        /*00b0*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64] ;
        /*00c0*/               @P0 BRA `(.L_x_1) ;
        /*00d0*/               @P3 BRA `(.L_x_9) ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_3);
        /*0100*/                   NOP;
"""


def kernel(**other):
    whole, masked, outside = sass.ways(LISTING)
    facts = dict(name="k", threads=128, registers=162, spills=0, shared=50 << 10, warnings=())
    return sass.Kernel(**(facts | other), whole=whole, masked=masked, outside=outside)


def test_the_innermost_loop_with_products_is_read_with_its_mask_and_without():
    found = kernel()
    assert (found.count(), found.count(masked=True), found.outside) == (9, 11, 5)
    assert found.count("FSETP", "FSEL") == 0
    assert found.count("FSETP", "FSEL", masked=True) == 2
    assert found.loads_ahead == 2
    assert found.shapes == {"m16n8": 2}
    assert not found.serialised and kernel(warnings=("wgmma is serialized",)).serialised


def test_cycles_are_those_of_the_programming_guides_throughputs():
    found, a100 = kernel(), chips()["a100-40gb"]
    assert found.scores(products=2, head_size=64) == 2 * 16 * 8 * 16 / 32 / 128
    cycles = found.cycles(a100, masked=True)
    assert cycles == {
        "matrix": 2 * 2048 / 1024,
        "exponentials": 32 / 16,
        "issue": 11 / 4,
        "fma": 32 / 64,
        "alu": 2 * 32 / 64,
        "shared": (512 + 512) / 128,
    }


def test_a_core_holds_as_many_blocks_as_registers_threads_and_shared_memory_allow():
    a100 = chips()["a100-40gb"]  # 65,536 registers, 2,048 threads, 164 KiB
    assert kernel().blocks_a_core(a100) == 3  # 168 registers x 128, and 51 KiB
    assert kernel(registers=255).blocks_a_core(a100) == 2
    assert kernel(registers=32, threads=1024).blocks_a_core(a100) == 2
    assert kernel(shared=100 << 10).blocks_a_core(a100) == 1


def test_a_warpgroups_products_count_by_columns_and_by_where_their_factors_lie():
    both = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR12], R24, gsb0"
    one = "HGMMA.64x64x16.F32.BF16 R88, R148, gdesc[UR12].tnspB, R88"
    found = sass.Kernel("k", 128, 168, 0, 0, (), (both, one), (both, one), 0)
    assert found.shapes == {"n16 ss": 1, "n64 rs": 1}
    cycles = found.cycles(chips()["h100"])
    assert cycles["matrix"] == (16 + 64) * 64 * 16 / 4 / 2048
    assert cycles["shared"] == ((64 + 16) * 32 + 64 * 32) / 4 / 128
