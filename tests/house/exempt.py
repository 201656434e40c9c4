"""Which chapters a rule does not bind yet: those that stood before it and have not been reworked since.

A chapter that keeps a rule must leave this list, and test_rules.py says so. A new chapter is listed for its cost at
most, until that has been cut.
"""

EXEMPT = {
    "00_start_here": """
        budget exercise_kinds expectations schematic
    """,
    "01_attention": """
        budget exercise_kinds expectations schematic words_per_line
    """,
    "02_transformer": """
        budget exercise_kinds expectations median_cell schematic walls words_per_line
    """,
    "03_positions": """
        short_cells budget exercise_kinds expectations median_cell schematic walls words_per_line
    """,
    "04_length_extrapolation": """
        budget exercise_kinds expectations median_cell schematic words_per_line
    """,
    "05_normalization": """
        budget exercise_kinds expectations median_cell schematic walls words_per_line
    """,
    "06_depth_and_residuals": """
        budget exercise_kinds expectations median_cell names_once schematic walls words_per_line
    """,
    "07_feedforward": """
        budget exercise_kinds expectations median_cell schematic walls words_per_line
    """,
    "08_experts_and_elastic_width": """
        budget exercise_kinds expectations median_cell schematic walls words_per_line
    """,
    "09_attention_variants": """
        budget exercise_kinds expectations median_cell names_once schematic walls words_per_line
    """,
    "10_sparse_attention": """
        short_cells budget exercise_kinds expectations median_cell schematic walls words_per_line
    """,
    "11_linear_attention": """
        budget exercise_kinds expectations median_cell schematic walls words_per_line
    """,
    "12_spectral_mixing": """
        short_cells budget exercise_kinds expectations median_cell names_once schematic walls words_per_line
    """,
    "13_hierarchical_attention": """
        budget exercise_kinds expectations median_cell names_once schematic walls words_per_line
    """,
    "14_memory": """
        budget exercise_kinds expectations median_cell schematic walls words_per_line
    """,
    "15_state_spaces": """
        budget exercise_kinds expectations median_cell schematic walls words_per_line
    """,
    "16_sequence_compression": """
        short_cells budget exercise_kinds expectations median_cell names_once schematic walls words_per_line
    """,
    "17_long_range_arena": """
        budget exercise_kinds expectations median_cell schematic walls words_per_line
    """,
    "70_first_kernels": """
        budget exercise_kinds expectations schematic
    """,
    "71_reductions_and_norms": """
        budget exercise_kinds expectations schematic
    """,
    "72_matmul": """
        budget exercise_kinds expectations kernel_exercise median_cell schematic
    """,
    "73_flash_attention": """
        budget exercise_kinds expectations kernel_exercise schematic walls
    """,
    "74_variable_length": """
        budget exercise_kinds expectations kernel_exercise schematic walls words_per_line
    """,
    "75_linear_attention_kernels": """
        budget exercise_kinds expectations kernel_exercise schematic
    """,
    "90_lab": """
        budget exercise_kinds expectations median_cell names_once schematic walls words_per_line
    """,
    "20_vision_transformer": """
        budget
    """,
    "21_data_efficient_vision": """
        budget
    """,
    "22_any_resolution": """
        budget
    """,
    "23_patches_and_pixels": """
        budget
    """,
    "98_data": """
        exercise_kinds
    """,
    "99_atlas": """
        budget exercise_kinds expectations median_cell schematic walls words_per_line
    """,
}


def exempt(chapter: str) -> set[str]:
    """The names of the rules that do not bind a chapter yet."""
    return set(EXEMPT.get(chapter, "").split())
