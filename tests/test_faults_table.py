"""FAULTS and FIELD: what goes wrong in real projects, and the tests that say what a user gets then.

A fault without a test, or with one that is not there any more, fails here.
"""

import ast
import pathlib
import re
from functools import cache

import pytest

from tests.field.table import TABLE

HERE = pathlib.Path(__file__).parent

FAULTS = {
    1: (
        "kill -9 at a step, then resume from last.ckpt",
        "contracts/test_resume.py::test_kill_nine_and_resume",
    ),
    2: (
        "resume in mid-epoch, at an epoch's last batch, twice, after a round, at weight 0, around a warm-up",
        "contracts/test_resume.py::test_resume_after_every_step_equals_the_uninterrupted_run",
        "contracts/test_resume.py::test_resume_of_a_resumed_run",
        "contracts/test_resume.py::test_resume_around_a_warm_up",
        "contracts/test_resume.py::test_mixin_resumes_exactly",
        "selective/test_rounds.py::test_resume_in_any_round_is_exact",
        "selective/test_rounds.py::test_resume_twice_and_with_workers",
        "collaborative/test_search.py::test_resumed_it_is_not_searched_again_and_equal_to_the_bit",
    ),
    3: (
        "resume without our callback",
        "contracts/test_checkpoints.py::test_a_run_without_the_callback_resumes_it",
        "contracts/test_checkpoints.py::test_strip_checkpoint_leaves_a_plain_run",
        "contracts/test_checkpoints.py::test_a_checkpoint_of_another_structure_is_refused_by_name",
        "contracts/test_checkpoints.py::test_a_checkpoint_of_two_methods_is_refused_where_one_is_missing",
    ),
    4: (
        "resume with other options",
        "contracts/test_resume.py::test_resume_with_other_options_is_refused_with_the_differences",
        "contracts/test_checkpoints.py::test_a_checkpoint_of_other_options_is_refused_with_the_difference",
        "contracts/test_checkpoints.py::test_other_options_of_a_changed_network_are_refused_with_the_differences",
        "selective/test_rounds.py::test_resume_with_other_neighbors_is_refused_with_the_differences",
        "selective/test_rounds.py::test_resume_with_another_target_is_refused",
    ),
    5: (
        "a checkpoint of another version",
        "contracts/test_resume.py::test_state_of_another_version_is_refused_with_both_versions",
        "selective/test_selection.py::test_a_file_of_another_version_or_kind_is_refused",
    ),
    6: (
        "SIGTERM in training, and while images are selected",
        "contracts/test_faults.py::test_sigterm_stops_cleanly",
        "contracts/test_as_found.py::test_a_mixins_module_after_fit_a_crash_ctrl_c_and_sigterm",
        "selective/test_faults.py::test_a_run_behind_kill_nine_sigterm_or_ctrl_c_describes_only_what_is_missing",
        "selective/test_faults.py::test_a_trainer_that_is_told_to_stop_while_selecting_stops_cleanly",
    ),
    7: (
        "NaN or infinity in a term",
        "contracts/test_faults.py::test_a_nan_pixel_stops_in_front_of_the_optimizer_and_is_named",
        "contracts/test_faults.py::test_a_nan_pixel_of_the_target_stops_before_the_optimizer_and_the_term_is_named",
        "contracts/test_faults.py::test_an_exploded_source_loss_names_the_samples",
        "selective/test_rounds.py::test_answers_that_are_not_finite_stop_the_run",
        "collaborative/test_training.py::test_a_loss_that_is_no_number_stops_before_the_step_and_names_the_networks",
    ),
    8: (
        "steps that the gradient scaler skips",
        "contracts/test_faults.py::test_a_step_that_the_gradient_scaler_skips_is_not_called_nan",
    ),
    9: (
        "the Trainer's debugging options, and training without an end",
        "contracts/test_surroundings.py::test_debugging_options_of_the_trainer",
        "contracts/test_faults.py::test_training_without_an_end_asks_for_steps",
        "selective/test_rounds.py::test_training_without_an_end_asks_for_steps_between_rounds",
        "collaborative/test_search.py::test_a_dry_run_tries_one_candidate_and_keeps_nothing",
    ),
    10: (
        "manual optimization, LBFGS, several optimizers",
        "contracts/test_faults.py::test_manual_optimization_is_refused_with_the_mixins_name",
        "contracts/test_faults.py::test_lbfgs_is_refused",
        "contracts/test_silence.py::test_an_optimizer_that_runs_its_closure_twice_is_refused",
        "adafilter/test_optimizers.py::test_several_optimizers_in_manual_optimization_by_the_mixin",
    ),
    11: (
        "an optimizer that holds only some parameters",
        "contracts/test_faults.py::test_training_only_the_head_is_said_to_have_no_effect",
        "contracts/test_faults.py::test_mixin_names_the_line_for_parameters_that_nobody_trains",
        "contracts/test_faults.py::test_training_without_an_optimizer_is_refused",
        "contracts/test_trains.py::test_a_new_source_head_reaches_an_optimizer_of_chosen_parameters",
        "glue/test_optimizers.py::test_in_every_form_that_configure_optimizers_may_return",
        "adafilter/test_optimizers.py::test_a_mixins_gate_that_no_optimizer_holds_is_named",
        "adafilter/test_optimizers.py::test_only_the_head_trained_is_said_to_have_no_effect",
        "collaborative/test_training.py::test_new_networks_reach_an_optimizer_of_groups_each_at_its_neighbors_rate",
        "gated/test_invariants.py::test_what_is_new_learns_as_fast_as_the_head",
    ),
    12: (
        "every scheduler of torch's",
        "contracts/test_faults.py::test_every_scheduler_gives_the_rates_of_a_run_without_us",
        "adafilter/test_optimizers.py::test_gates_in_a_group_of_the_users_own_learn_at_its_rate_and_resume",
    ),
    13: (
        "fit twice, then validate, test and predict",
        "contracts/test_as_found.py::test_after_fit_validate_test_and_a_second_fit",
        "contracts/test_as_found.py::test_a_new_trainer_starts_anew",
        "contracts/test_as_found.py::test_a_second_fit_of_the_same_trainer_goes_on",
        "contracts/test_silence.py::test_a_mixins_second_trainer_begins_again",
    ),
    14: (
        "two of our callbacks, and ours beside Lightning's",
        "contracts/test_surroundings.py::test_every_pair_composes_or_is_refused_by_name",
        "contracts/test_surroundings.py::test_beside_lightnings_own_the_numbers_are_as_without_them",
        "contracts/test_checkpoints.py::test_weight_averaging_behind_us_works_and_in_front_is_refused",
        "adafilter/test_optimizers.py::test_beside_lightnings_backbone_finetuning",
    ),
    15: (
        "BatchNorm that is frozen",
        "source/test_passes.py::test_frozen_and_untracked_batchnorm_stay_what_they_are",
        "adafilter/test_invariants.py::test_freezing_survives_train_and_thawing",
        "adafilter/test_gradients.py::test_synchronized_batch_norm_takes_the_tuned_one_and_leaves_the_frozen",
        "collaborative/test_depths.py::test_frozen_norms_survive_train_and_conversion_and_come_back",
        "gated/test_invariants.py::test_a_norm_of_the_users_that_rests_is_not_woken_by_the_warm_up",
    ),
    16: (
        "networks of every make: no BatchNorm, transformers, tied weights, odd convolutions, lazy layers",
        "field/test_field.py::test_as_it_comes",
        "contracts/test_silence.py::test_statistics_of_instance_norm_cannot_be_protected",
        "adafilter/test_sites.py::test_networks_that_people_use",
        "adafilter/test_sites.py::test_what_stands_in_the_way_is_named",
        "adafilter/test_sites.py::test_what_is_not_right_is_refused_by_name",
        "collaborative/test_depths.py::test_weights_that_are_shared_with_a_layer_above_the_cut_learn",
        "collaborative/test_ensemble.py::test_networks_of_any_make_join",
    ),
    17: (
        "gates that have collapsed",
        "gated/test_invariants.py::test_a_collapse_of_the_filters_gates_is_said",
        "gated/test_invariants.py::test_a_dead_gate_is_said_to_be_dead",
    ),
    18: (
        "compiled modules and activation checkpointing",
        "field/test_compiled.py::test_a_whole_compiled_module",
        "field/test_compiled.py::test_a_compiled_network_follows_the_whole_schedule",
        "contracts/test_as_found.py::test_a_compiled_modules_own_step_comes_back",
        "contracts/test_silence.py::test_checkpointing_by_hand_does_not_move_protected_statistics",
        "contracts/test_silence.py::test_recomputed_activations_are_refused_where_statistics_would_move",
        "adafilter/test_gradients.py::test_activation_checkpointing",
        "adafilter/test_gradients.py::test_reentrant_checkpointing_is_refused",
        "adafilter/test_gradients.py::test_two_passes_with_checkpointing_are_refused",
        "adafilter/test_gradients.py::test_compiled",
        "collaborative/test_training.py::test_compiled_it_trains_the_same",
        "collaborative/test_training.py::test_reentrant_checkpointing_is_refused_and_the_other_is_right",
        "gated/test_invariants.py::test_the_body_rests_under_activation_checkpointing_too",
    ),
    19: (
        "two processes, also with gates shut everywhere and a weight that reaches 0",
        "contracts/test_ranks.py::test_two_ranks_equal_each_other_after_every_step",
        "contracts/test_ranks.py::test_two_ranks_equal_one_process",
        "contracts/test_ranks.py::test_methods_together_on_two_ranks_equal_each_other_and_one_process",
        "selective/test_ranks.py::test_rounds_on_two_processes_give_the_budgets_of_one",
    ),
    20: (
        "strategies that shard, and spawned processes",
        "contracts/test_faults.py::test_strategies_that_shard_are_refused_by_name",
        "contracts/test_checkpoints.py::test_spawned_processes_cannot_hand_changed_layers_back",
    ),
    21: (
        "ranks with unequal shares, another number of them on resume, one that fails",
        "source/test_stream.py::test_another_number_of_ranks_goes_on_at_the_same_place",
        "selective/test_ranks.py::test_every_process_has_the_selection_of_one",
        "selective/test_ranks.py::test_another_number_of_processes_goes_on_where_some_were_killed",
        "selective/test_ranks.py::test_where_one_process_fails_all_end_and_say_which",
        "contracts/test_ranks.py::test_general_discrimination_is_the_same_on_two_processes",
    ),
    22: (
        "two jobs that write one cache",
        "selective/test_faults.py::test_processes_that_save_at_once_never_leave_a_mixed_file",
        "selective/test_faults.py::test_two_jobs_with_one_cache_do_not_disturb_each_other",
    ),
    23: (
        "an empty source, no neighbor, more neighbors than images, batches larger than the source, one image",
        "source/test_task.py::test_refused_at_construction",
        "contracts/test_faults.py::test_batches_larger_than_the_source_draw_it_again",
        "selective/test_functional.py::test_neighbors_that_cannot_be_are_refused",
        "selective/test_select.py::test_more_neighbors_than_there_are_is_refused_before_and_after_some_are_left_out",
        "selective/test_rounds.py::test_more_neighbors_than_source_images_are_refused_at_construction",
        "selective/test_rounds.py::test_a_small_source_lends_what_is_left_of_it",
        "advising/test_trials.py::test_no_batch_of_one_image_is_trained_on",
    ),
    24: (
        "a selection or its cache that is damaged, foreign, read-only, or on a full disk",
        "selective/test_selection.py::test_a_flipped_bit_anywhere_is_seen",
        "selective/test_selection.py::test_a_truncated_file_is_refused",
        "selective/test_selection.py::test_a_folder_that_cannot_be_is_refused",
        "selective/test_selection.py::test_a_full_disk_leaves_what_was_there_and_nothing_else",
        "selective/test_select.py::test_a_cache_of_something_else_is_refused_with_the_difference",
        "selective/test_faults.py::test_a_damaged_block_is_described_again",
        "selective/test_faults.py::test_a_damaged_cache_is_refused_and_stays",
        "selective/test_faults.py::test_work_of_another_selection_is_never_used",
        "selective/test_faults.py::test_a_disk_that_fills_up_is_told_and_finished_blocks_are_used_again",
    ),
    25: (
        "images that cannot be read",
        "selective/test_select.py::test_unreadable_source_images_are_skipped_counted_and_listed",
        "selective/test_select.py::test_above_one_percent_unreadable_is_an_error_that_names_one_and_its_reason",
        "selective/test_select.py::test_an_unreadable_target_image_is_refused_with_its_index",
        "selective/test_pictures.py::test_a_file_that_is_torn_says_why",
        "contracts/test_faults.py::test_a_failing_sample_is_named_by_its_index",
    ),
    26: (
        "images of every kind: grey, transparent, 16 bits, other sizes, NaN, out of range",
        "selective/test_pictures.py::test_an_image_of_any_kind_is_a_picture",
        "selective/test_pictures.py::test_what_is_no_picture_says_why",
        "selective/test_select.py::test_one_normalised_side_is_refused",
        "contracts/test_faults.py::test_source_samples_that_do_not_fit_are_named",
        "contracts/test_faults.py::test_pixels_that_nobody_normalised_are_pointed_out",
        "contracts/test_auto.py::test_sides_that_a_glance_tells_apart_are_refused",
    ),
    27: (
        "labels that the head does not know, and a head of another width",
        "contracts/test_faults.py::test_source_samples_that_do_not_fit_are_named",
        "contracts/test_faults.py::test_labels_are_checked_at_setup_where_the_dataset_lists_them",
        "contracts/test_faults.py::test_labels_in_another_order_than_the_heads_are_pointed_out",
        "contracts/test_faults.py::test_a_source_head_of_another_width_is_refused",
        "selective/test_rounds.py::test_labels_that_rounds_cannot_use_are_refused",
    ),
    28: (
        "batches of every form",
        "field/test_field.py::test_as_it_comes",
        "contracts/test_faults.py::test_hooks_that_do_not_know_source_batches_are_pointed_out",
        "contracts/test_silence.py::test_a_wrong_adapt_shows_what_it_was_given",
        "contracts/test_auto.py::test_a_target_batch_that_is_not_read_as_the_sources_is_named",
        "collaborative/test_training.py::test_labels_may_lie_elsewhere",
        "gated/test_invariants.py::test_labels_are_found_in_a_mapping_or_by_an_adapter_and_a_step_of_two_passes_is_refused",
    ),
    29: (
        "datasets without a length",
        "source/test_task.py::test_refused_at_construction",
        "contracts/test_auto.py::test_a_target_that_cannot_be_looked_at_is_named_with_the_line_to_write",
        "selective/test_pictures.py::test_what_has_no_samples_by_index_is_refused",
    ),
    30: (
        "target images in the source",
        "selective/test_select.py::test_a_planted_copy_is_the_nearest_and_is_reported",
        "selective/test_select.py::test_protected_images_are_found_and_left_out",
        "selective/test_select.py::test_every_copy_of_a_protected_image_is_left_out",
        "selective/test_duplicates.py::test_a_copy_is_found",
    ),
    31: (
        "a source larger than memory",
        "selective/test_search.py::test_groups_of_queries_and_blocks_of_the_source_change_nothing",
        "selective/test_select.py::test_lines_tell_what_the_work_takes_before_it_starts",
        "selective/test_faults.py::test_a_disk_that_is_too_small_is_told_before_the_work",
    ),
    32: (
        "checkpoints from strangers",
        "contracts/test_silence.py::test_a_checkpoint_that_holds_more_than_plain_data_is_read_only_when_asked",
        "selective/test_selection.py::test_a_checkpoint_of_pickles_is_never_unpickled",
    ),
    33: (
        "head, backbone or tap that is not found or not clear",
        "test_roles.py::test_what_is_unclear_lists_the_candidates",
        "adafilter/test_sites.py::test_what_is_not_right_is_refused_by_name",
        "gated/test_invariants.py::test_what_is_not_right_is_refused_by_name",
        "collaborative/test_ensemble.py::test_what_cannot_be_joined_is_named_and_the_module_is_as_found",
    ),
    34: (
        "networks of other widths, sizes and normalisation",
        "contracts/test_faults.py::test_a_source_head_of_another_width_is_refused",
        "contracts/test_auto.py::test_a_forward_that_brings_both_to_one_size_is_not_refused",
        "collaborative/test_ensemble.py::test_pictures_are_normalised_and_sized_as_each_network_knows_them",
    ),
    35: (
        "candidates of a search that fail, and a search that is interrupted",
        "collaborative/test_search.py::test_a_candidate_that_fails_costs_only_itself",
        "collaborative/test_search.py::test_where_all_fail_nothing_is_frozen_and_that_is_said",
        "collaborative/test_search.py::test_ctrl_c_in_mid_candidate_keeps_what_is_finished",
        "collaborative/test_search.py::test_interrupted_and_resumed_it_ends_with_the_same_plan",
        "collaborative/test_strategies.py::test_the_same_seed_asks_the_same_and_another_asks_other",
    ),
    36: (
        "options that are misspelt or out of range",
        "test_schedules.py::test_what_cannot_be_right_is_refused_at_construction",
        "soft/test_options.py::test_refused_at_construction",
        "selective/test_options.py::test_bad_values_are_refused_by_name",
        "adafilter/test_optimizers.py::test_options_are_refused_at_construction",
        "gated/test_invariants.py::test_options_are_refused_at_construction",
        "collaborative/test_ensemble.py::test_wrong_options_are_refused_when_it_is_made",
        "contracts/test_faults.py::test_a_schedule_that_ends_after_training_is_refused",
    ),
    37: (
        "no logger, no bar, a missing extra, one namespace of Lightning alone",
        "contracts/test_surroundings.py::test_runs_the_same_in_pytorch_lightning",
        "contracts/test_surroundings.py::test_pytorch_lightning_alone_is_enough",
        "contracts/test_surroundings.py::test_importing_the_package_loads_no_heavy_dependency",
        "contracts/test_surroundings.py::test_a_missing_extra_is_named",
        "collaborative/test_strategies.py::test_optuna_missing_names_the_extra",
    ),
    38: (
        "malicious uploads of Lightning",
        "contracts/test_surroundings.py::test_malicious_uploads_of_lightning_are_never_installed",
    ),
}

FIELD: dict[str, tuple[str, ...]] = {
    "S6": (
        "a checkpoint that holds the user's network",
        "contracts/test_no_trace.py::test_a_checkpoint_that_holds_the_network_loads_without_the_package",
        "contracts/test_no_trace.py::test_a_mixins_checkpoint_holds_the_network_without_hooks",
    ),
    "M1": (
        "hyperparameters that are more than plain data",
        "test_files.py::test_hyperparameters_that_are_not_plain_ask_for_weights_only_false_and_for_no_class",
    ),
    "D2": (
        "a sample that raises what ends a loop or a program",
        "contracts/test_no_trace.py::test_a_sample_that_would_end_the_loop_is_an_error_that_names_it",
        "contracts/test_no_trace.py::test_the_same_where_workers_read",
    ),
    "D3": (
        "batch hooks with memory",
        "contracts/test_no_trace.py::test_hooks_remember_the_targets_batch_when_its_loss_is_computed",
        "contracts/test_no_trace.py::test_a_datamodules_hooks_remember_the_targets_batch_too",
        "contracts/test_no_trace.py::test_mixup_that_the_source_loss_does_not_know_is_refused",
    ),
    "D4": (
        "labels that are not class numbers, and what makes such of them",
        "glue/test_first_loss.py::test_labels_are_called_what_they_are",
        "glue/test_first_loss.py::test_labels_in_a_column_are_class_numbers_everywhere",
        "glue/test_first_loss.py::test_names_and_pairs_get_advice_that_changes_something",
    ),
    "D6": (
        "options of one name and other values",
        "test_values.py::test_the_same_made_again_has_the_same_value_and_all_others_another",
        "test_values.py::test_a_resume_with_another_value_of_one_name_is_refused_and_with_the_same_is_not",
    ),
    "D7": (
        "a LayerPlan that is damaged, or that no search could find",
        "test_files.py::test_a_plan_that_no_search_could_find_is_refused_whatever_its_checksum",
        "test_files.py::test_a_plan_of_before_checksums_is_refused_and_says_so",
        "test_mutations.py::test_a_damaged_file_or_state_is_refused_or_read_right",
    ),
    "D14": (
        "labels of other whole types than int64",
        "test_batches.py::test_whole_numbers_of_any_type_are_what_a_criterion_takes",
        "fuzz/test_batches.py::test_labels_are_found_or_refused",
    ),
    "D15": (
        "values that are not finite, and labels that are None, without a word of whose they are",
        "source/test_gap.py::test_features_that_are_not_finite_are_named_by_side_and_row",
        "source/test_stream.py::test_a_sample_or_a_part_of_it_that_is_none_is_said_to_be_one",
    ),
    "D16": (
        "listed labels that the samples do not have",
        "test_splitting.py::test_labels_that_samples_map_are_read_from_the_samples",
    ),
    "D17": (
        "files that are not files of ours, and places where none can be written",
        "test_files.py::test_what_is_not_a_file_of_ours_is_refused_by_name",
        "test_files.py::test_a_truncated_checkpoint_is_refused_by_name",
        "test_files.py::test_what_cannot_be_written_is_refused_by_name_and_leaves_nothing",
        "test_files.py::test_a_link_stays_one_and_what_it_names_is_written",
        "test_files.py::test_a_picture_goes_into_a_new_folder_and_an_ending_that_is_not_one_is_named",
        "test_files.py::test_class_names_that_are_not_text_are_drawn",
        "test_files.py::test_a_selection_with_another_type_in_its_header_is_refused",
        "test_files.py::test_a_selection_with_other_metadata_is_refused",
    ),
    "D1": (
        "a second Trainer that runs the module inside of a fit",
        "contracts/test_another_trainer.py::test_a_fit_goes_on_as_if_another_trainer_had_not_run_the_module",
        "contracts/test_another_trainer.py::test_a_warm_up_lasts_as_many_epochs_as_its_own_trainer_counts",
        "contracts/test_another_trainer.py::test_a_callback_that_another_trainer_is_given_too_stays_in_its_fit",
        "contracts/test_another_trainer.py::test_a_mixin_goes_by_the_trainer_that_fits_it",
        "contracts/test_another_trainer.py::test_a_second_fit_inside_of_the_first_is_refused_by_name",
    ),
    "D8": (
        "a target that changes within a run",
        "contracts/test_another_trainer.py::test_other_data_in_a_second_fit_is_refused_where_images_are_borrowed_for_the_first",
        "contracts/test_another_trainer.py::test_a_reloaded_loader_with_other_images_is_refused_too",
        "contracts/test_another_trainer.py::test_the_same_dataset_in_a_second_fit_is_known_without_a_look",
    ),
    "D9": (
        "custom samplers and batch samplers",
        "glue/test_served.py::test_what_a_loader_draws_is_what_is_served",
        "glue/test_served.py::test_a_sampler_that_shows_nothing_is_refused_by_name_and_target_cures_it",
        "glue/test_served.py::test_a_sampler_of_torchs_kind_that_draws_otherwise_is_refused_by_name",
        "glue/test_served.py::test_images_of_weight_0_are_neither_looked_at_nor_selected_for",
    ),
    "D5": (
        "whole numbers and floats of every type and range",
        "selective/test_data_identity.py::test_an_images_own_copy_is_its_nearest_neighbor_in_numbers_of_any_type",
        "selective/test_data_identity.py::test_copies_of_protected_images_are_found_in_numbers_of_another_type",
        "selective/test_data_identity.py::test_sides_whose_ranges_differ_by_orders_are_refused_with_what_was_found_on_both",
    ),
    "D10": (
        "a kept selection whose source changed where no probe looks",
        "selective/test_data_identity.py::test_a_kept_selection_is_refused_where_what_is_listed_changed_that_no_probe_sees",
        "selective/test_data_identity.py::test_where_nothing_is_listed_it_says_that_only_some_images_were_compared",
    ),
    "D11": (
        "a source that was reordered, whose labels are not listed",
        "contracts/test_same_source.py::test_another_source_is_refused_with_the_samples_that_are_others",
        "contracts/test_same_source.py::test_samples_that_are_never_the_same_are_said_not_to_be_checked",
    ),
    "D12": (
        "a checkpoint of a method that changes layers, resumed with a source method alone",
        "glue/test_company.py::test_a_changed_networks_checkpoint_with_a_source_method_alone_names_who_is_missing",
    ),
    "D13": (
        "another module in a Trainer's second fit",
        "contracts/test_another_trainer.py::test_another_module_in_a_second_fit_gets_a_part_of_its_own",
    ),
    "D18": (
        "finetuning-scheduler and pruning beside ours",
        "glue/test_company.py::test_a_finetuning_scheduler_lists_the_users_parameters_as_they_are_trained",
        "glue/test_company.py::test_pruning_comes_first",
    ),
    "S1": (
        "a Sequential whose children are counted by position",
        "field/test_field.py::test_as_it_comes[ThawedFromTheEnd-adafilter]",
    ),
    "S2": (
        "accuracies of several networks with one logit",
        "field/test_field.py::test_with_what_the_message_names[OneLogit-several]",
    ),
    "S3": (
        "a transformer without a head beside other networks",
        "field/test_field.py::test_as_it_comes[TransformerWithoutHead-several]",
    ),
    "S4": (
        "mixup that the labels do not follow, and the auxiliary classifier",
        "field/test_field.py::test_as_it_comes[MixupInTheStep-aux]",
        "field/test_field.py::test_as_it_comes[MixupInTheHook-aux]",
        "glue/test_first_loss.py::test_what_the_auxiliary_classifier_learns_by_is_said_once_and_labels_settle_it",
    ),
    "S5": (
        "a loss that is a sum over the images",
        "field/test_field.py::test_as_it_comes[LossTimesBatch-soft]",
        "field/test_field.py::test_as_it_comes[LossTimesBatch-several]",
        "glue/test_first_loss.py::test_a_sum_is_refused_before_the_first_step",
        "glue/test_first_loss.py::test_with_a_weight_for_a_sum_or_labels_that_say_nothing_it_is_silent",
        "glue/test_first_loss.py::test_a_binary_sum_is_one_of_its_numbers",
    ),
    "S7": (
        "a trained network beside a body that its user froze",
        "field/test_field.py::test_as_it_comes[FrozenConvNeXt-several]",
        "glue/test_first_loss.py::test_a_network_far_below_the_others_is_named_once",
        "glue/test_first_loss.py::test_the_warning_comes_of_validation",
    ),
    "C1": (
        "a forward that switches gradients on, where the network is looked at",
        "field/test_field.py::test_as_it_comes[GradientsSwitchedInForward-auto]",
        "field/test_field.py::test_as_it_comes[GradientsSwitchedInForward-advise]",
    ),
    "C2": (
        "the same with gated filters",
        "field/test_field.py::test_as_it_comes[GradientsSwitchedInForward-adafilter]",
    ),
    "C3": (
        "a forward that takes a batch",
        "field/test_field.py::test_as_it_comes[ForwardOfBatch-soft]",
        "field/test_field.py::test_as_it_comes[ForwardOfBatch-advise]",
        "field/test_field.py::test_with_what_the_message_names[ForwardOfBatch-soft]",
        "field/test_field.py::test_with_what_the_message_names[ForwardOfBatch-advise]",
    ),
    "C4": (
        "one logit: several networks, and the auxiliary classifier",
        "field/test_field.py::test_as_it_comes[OneLogit-several]",
        "field/test_field.py::test_as_it_comes[OneLogit-aux]",
    ),
    "C5": (
        "rounds, and labels that are not class numbers",
        "field/test_field.py::test_as_it_comes[MultiLabel-selective]",
        "field/test_field.py::test_as_it_comes[OneHot-selective]",
    ),
    "C6": (
        "a classifier that is a convolution",
        "field/test_field.py::test_as_it_comes[ConvolutionalClassifier-soft]",
        "field/test_field.py::test_as_it_comes[ConvolutionalClassifier-advise]",
    ),
    "C9": (
        "a network that ends in a softmax or a sigmoid",
        "field/test_field.py::test_as_it_comes[SoftmaxAtTheEnd-several]",
    ),
    "M2": (
        "mappings and lists that are not dict and list, a number for a weight",
        "test_options.py::test_a_weight_is_a_schedule_a_number_or_a_mapping_alike_everywhere",
        "test_options.py::test_lists_and_mappings_of_omegaconfs_go_where_lists_and_mappings_go",
        "test_options.py::test_what_a_mapping_cannot_be_is_refused_by_name",
    ),
    "M3": (
        "a frozen body, and a source that could not change it",
        "field/test_field.py::test_as_it_comes[FrozenConvNeXt-soft]",
    ),
    "M4": (
        "one pass for both where backbone and head are apart",
        "field/test_field.py::test_as_it_comes[ThawedFromTheEnd-joint]",
        "field/test_field.py::test_as_it_comes[LayersOnTheModule-joint]",
    ),
    "M5": (
        "batches of three for a selection",
        "field/test_field.py::test_as_it_comes[ThreeTuples-selective]",
        "field/test_field.py::test_with_what_the_message_names[ThreeTuples-selective]",
    ),
    "M6": (
        "batches that are dictionaries",
        "field/test_field.py::test_as_it_comes[DictBatches-soft]",
        "field/test_field.py::test_with_what_the_message_names[DictBatches-soft]",
    ),
    "M8": (
        "a head that is asked for, then refused",
        "field/test_field.py::test_as_it_comes[ConvolutionalClassifier-gated]",
        "field/test_field.py::test_as_it_comes[ConvolutionalClassifier-several]",
    ),
    "M9": (
        "gated filters where there is only a stem",
        "field/test_field.py::test_as_it_comes[VisionTransformer-adafilter]",
        "field/test_field.py::test_as_it_comes[TransformerWithoutHead-adafilter]",
    ),
    "C7": (
        "several networks on labels of several classes",
        "field/test_field.py::test_as_it_comes[OneHot-several]",
        "field/test_field.py::test_with_what_the_message_names[OneHot-several]",
    ),
    "M7": (
        "advice on labels that adapt= has to read",
        "field/test_field.py::test_as_it_comes[OneHot-advise]",
        "field/test_field.py::test_as_it_comes[DictBatches-advise]",
        "field/test_field.py::test_with_what_the_message_names[OneHot-advise]",
        "field/test_field.py::test_with_what_the_message_names[DictBatches-advise]",
    ),
    "C8": (
        "advice whose trials are too short for a schedule",
        "advising/test_trials.py::test_a_schedule_that_the_trial_is_too_short_for_is_said_to_be_in_a_trial",
    ),
}


# of the faults above 38, which the field's numbers they are
FOUND_IN_THE_FIELD = {
    39: ("a second Trainer that evaluates the module inside a fit", "D1"),
    40: ("exceptions of a dataset that end a loop", "D2"),
    41: ("batch hooks with memory, mixup, soft labels", "D3", "D4", "S4"),
    42: ("pixels of every type", "D5"),
    43: ("options of one name and other values", "D6"),
    44: ("plans and caches of a search that are damaged", "D7"),
    45: ("another target, module or loader in one Trainer or run", "D8", "D13"),
    46: ("samplers and batch samplers of one's own", "D9"),
    47: ("data that was reordered or changed", "D10", "D11"),
    48: ("containers that are read by position", "S1"),
    49: ("one logit, several labels, soft labels, a sum for a mean", "S2", "S5", "C4", "C5", "C9"),
    50: ("a head apart, a backbone without one", "S3"),
    51: ("a checkpoint that holds the user's network", "S6"),
    52: ("odd forward methods, and classifiers that are convolutions", "C1", "C2", "C3", "C6"),
    53: ("labels of every type, and lists that the samples do not follow", "D14", "D15", "D16"),
    54: ("files that are not files of ours", "D17"),
    55: ("finetuning-scheduler and pruning beside ours", "D18"),
    56: ("a network far below the others, or beside a frozen body", "S7"),
}
LETTERS = {"S": 7, "D": 18, "C": 9, "M": 9}
NUMBERS = [f"{letter}{number}" for letter, most in LETTERS.items() for number in range(1, most + 1)]
# yet; who writes one takes the number out
WITHOUT_A_TEST: set[str] = set()


@cache
def defined_tests(path: pathlib.Path) -> set[str]:
    """The test functions that a file defines."""
    body = ast.parse(path.read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_fault_is_in_a_table():
    assert [*FAULTS, *FOUND_IN_THE_FIELD] == list(range(1, 57))
    assert sorted([*FIELD, *WITHOUT_A_TEST]) == sorted(NUMBERS)
    assert {key for _, *keys in FOUND_IN_THE_FIELD.values() for key in keys} <= set(NUMBERS)


@pytest.mark.parametrize("table", [FAULTS, FIELD], ids=["faults", "field"])
def test_every_fault_has_tests_that_exist(table):
    for number, (text, *names) in table.items():
        assert text, number
        assert names, f"{number}, {text}, has no test"
        for name in names:
            file, test, cell = re.fullmatch(r"(.*)::(\w+)(?:\[(.*)\])?", name).groups()
            assert test in defined_tests(HERE / file), f"{number}: there is no {name}"
            if cell is not None:
                shape, method = cell.split("-")
                assert method in TABLE[shape], f"{number}: there is no {name}"
                assert test == "test_as_it_comes" or TABLE[shape][method].cure, f"{number}: there is no {name}"
