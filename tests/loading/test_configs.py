"""loading/configs.py: what a config asks for is implemented, or an error that names file and key."""

import json
import re
from pathlib import Path

import pytest
import tiny as reference
import torch
from tiny import change

import weights
from loading import files
from loading.configs import OVERRULED, SD14_CONFIGS
from loading.files import UserError
from weights import load_model


def change_clip(folder: Path, tower: str, **values: object) -> None:
    change(folder, "clip", **{tower: files.read_json(folder / "clip/config.json")[tower] | values})


def write_scheduler(folder: Path, config: dict) -> None:
    files.write_text(folder / weights.SCHEDULER, json.dumps(config))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "act_fn", "gelu"),
        ("unet", "use_linear_projection", True),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("unet", "attention_head_dim", [5, 10, 20, 20]),  # of Stable Diffusion 2
        ("unet", "block_out_channels", 8),
        ("unet", "sample_size", None),
        ("vae", "shift_factor", 0.1),
        ("vae", "latent_channels", "4"),
        ("text_encoder", "hidden_act", "gelu"),
        ("text_encoder", "vocab_size", -1),
        ("clip", "projection_dim", 0),
    ],
)
def test_a_config_that_is_not_implemented_names_file_and_key(tiny, part, key, value):
    change(tiny, part, **{key: value})
    with pytest.raises(UserError) as error:
        getattr(load_model(tiny), part)
    assert key in str(error.value)
    assert f"{part}/config.json" in str(error.value)


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 10000], ids=["empty", "list", "cut", "deep"])
def test_a_config_that_is_no_json_object_is_named(tiny, content):
    (tiny / "unet/config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        _ = load_model(tiny).unet


@pytest.mark.parametrize(
    ("part", "key"),
    [("unet", "cross_attention_dim"), ("unet", "up_block_types"), ("vae", "latent_channels"), ("clip", "vision_config")]
    + [("text_encoder", key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")],
)
def test_a_size_that_is_missing_names_file_and_key(tiny, part, key):
    path = tiny / part / "config.json"
    config = files.read_json(path)
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        getattr(load_model(tiny), part)
    assert key in str(error.value)
    assert f"{part}/config.json" in str(error.value)


def test_a_setting_nobody_knows_is_refused_unless_it_is_null(tiny):
    change(tiny, "unet", new_setting=None, _private="x", addition_embed_type_num_heads=64)
    assert load_model(tiny).unet is not None
    change(tiny, "unet", new_setting="deeper")
    with pytest.raises(UserError, match='new_setting is "deeper", a setting that is not implemented'):
        load_model(tiny)


def test_clip_checks_both_towers(tiny):
    change_clip(tiny, "vision_config", hidden_act="gelu")
    with pytest.raises(UserError, match='hidden_act is "gelu", and only "quick_gelu"'):
        _ = load_model(tiny).clip


@pytest.mark.parametrize("key", ["use_rope", "num_key_value_heads", "new_setting"])
@pytest.mark.parametrize("where", ["text_encoder", "clip", "text_config", "vision_config"])
def test_a_setting_of_clip_that_nobody_knows_is_refused(tiny, where, key):
    part = "text_encoder" if where == "text_encoder" else "clip"
    if where == part:
        change(tiny, part, **{key: 1})
    else:
        change_clip(tiny, where, **{key: 1})
    with pytest.raises(UserError, match=rf"{part}/config\.json: {key} is 1, a setting that is not implemented"):
        load_model(tiny, parts=(part,))


# What transformers around 4.21 wrote into the config of every network, those of openai/clip-vit-* among them.
DUMP = {
    **{"_name_or_path": "", "add_cross_attention": False, "architectures": None, "attention_dropout": 0.0},
    **{"bad_words_ids": None, "bos_token_id": 0, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None},
    **{"decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False, "dropout": 0.0},
    **{"early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": 2, "finetuning_task": None},
    **{"exponential_decay_length_penalty": None, "forced_bos_token_id": None, "forced_eos_token_id": None},
    **{"hidden_act": "quick_gelu", "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "initializer_factor": 1.0},
    **{"initializer_range": 0.02, "is_decoder": False, "is_encoder_decoder": False, "layer_norm_eps": 1e-05},
    **{"label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0},
    **{"model_type": "clip_text_model", "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1},
    **{"num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "output_scores": False},
    **{"pad_token_id": 1, "prefix": None, "problem_type": None, "projection_dim": 768, "pruned_heads": {}},
    **{"remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True, "sep_token_id": None},
    **{"return_dict_in_generate": False, "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False},
    **{"tie_encoder_decoder": False, "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0},
    **{"torch_dtype": None, "torchscript": False, "transformers_version": "4.21.0.dev0", "typical_p": 1.0},
    **{"use_bfloat16": False},
}


def test_configs_of_old_transformers_open(tiny):
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    change(tiny, "text_encoder", **DUMP, max_position_embeddings=77)
    for tower in ("text_config", "vision_config"):
        stated = {key: files.read_json(tiny / "clip/config.json")[tower][key] for key in sizes}
        change_clip(tiny, tower, **DUMP)
        change(tiny, "clip", **{f"{tower}_dict": {**stated, "projection_dim": 768}})
    change(tiny, "clip", initializer_factor=1.0, logit_scale_init_value=2.6592, torch_dtype="float32")
    assert load_model(tiny, parts=("text_encoder", "clip")).clip is not None


def test_a_network_that_cannot_be_built_is_named(tiny):
    change(tiny, "unet", norm_num_groups=5)
    with pytest.raises(UserError, match=r"unet/config\.json describes no UNet that can be built \(.* divisible"):
        _ = load_model(tiny).unet


def test_what_a_clip_says_twice_is_taken_as_transformers_takes_it(tiny):
    """It obeys text_config_dict."""
    change(tiny, "clip", text_config_dict={"num_attention_heads": 4})
    assert load_model(tiny).clip.text_model.encoder.layers[0].self_attn.heads == 4
    for again in ({"use_rope": True}, {"hidden_act": "gelu"}, [1]):
        change(tiny, "clip", text_config_dict=again)
        with pytest.raises(UserError, match=r"use_rope|hidden_act|both towers"):
            load_model(tiny, parts=("clip",))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "v_prediction"),
        ("beta_schedule", "linear"),
        ("num_train_timesteps", 0),
        ("beta_end", "big"),
        ("beta_start", 0.5),
        ("beta_start", True),
        ("beta_schedule", None),
        ("predict_epsilon", False),
        ("rescale_betas_zero_snr", True),
        ("timestep_type", "continuous"),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", []),
        ("use_flow_sigmas", True),
        ("variance_type", "learned_range"),
        ("new_setting", False),
    ],
)
def test_another_schedule_is_refused(tiny, key, value):
    write_scheduler(tiny, SD14_CONFIGS["scheduler"] | {key: value})
    with pytest.raises(UserError, match=key) as error:
        _ = load_model(tiny).schedule
    assert weights.SCHEDULER in str(error.value)


# As they are published or as diffusers writes them; see also those that it writes now, below.
PNDM = {**reference.BETAS, "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "skip_prk_steps": True}

SCHEDULERS = {
    "SD 1.4": PNDM
    | {"_diffusers_version": "0.7.0.dev0", "set_alpha_to_one": False, "steps_offset": 1}
    | {"trained_betas": None, "clip_sample": False},
    "SD 1.4 at first": PNDM | {"_diffusers_version": "0.2.2"},
    "SD 1.5": PNDM
    | {"prediction_type": "epsilon", "set_alpha_to_one": False, "steps_offset": 1}
    | {"timestep_spacing": "leading", "trained_betas": None},
    "DPM-Solver": PNDM
    | {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++"}
    | {"dynamic_thresholding_ratio": 0.995, "euler_at_final": False, "final_sigmas_type": "zero", "flow_shift": 1.0}
    | {"lambda_min_clipped": -float("inf"), "lower_order_final": True, "prediction_type": "epsilon"}
    | {"sample_max_value": 1.0, "solver_order": 2, "solver_type": "midpoint", "steps_offset": 1, "thresholding": False}
    | {"timestep_spacing": "linspace", "use_karras_sigmas": False, "use_lu_lambdas": False, "variance_type": None},
    "Euler": PNDM
    | {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "steps_offset": 1}
    | {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading", "timestep_type": "discrete"}
    | {"sigma_max": None, "sigma_min": None, "_use_default_values": ["sigma_min"], "use_karras_sigmas": False},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_stable_diffusion_open(tiny, name):
    expected = load_model(tiny).schedule
    write_scheduler(tiny, SCHEDULERS[name])
    schedule = load_model(tiny).schedule
    assert torch.equal(schedule.alphas_cumprod, expected.alphas_cumprod)
    assert schedule.timesteps(50) == expected.timesteps(50)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("steps_offset", 0, "steps_offset is 0, but 1 is used, as in diffusers' pipeline"),
        ("clip_sample", True, "clip_sample is true, but false is used, as in diffusers' pipeline"),
        ("timestep_spacing", "trailing", 'timestep_spacing "trailing": another sampler'),
        ("use_karras_sigmas", True, "use_karras_sigmas true: another sampler"),
        ("sigma_max", 14.6, "sigma_max 14.6: another sampler"),
        ("thresholding", True, "thresholding true: another sampler"),
        ("original_inference_steps", 50, "original_inference_steps 50: another sampler"),
    ],
)
def test_where_our_samplers_go_another_way_a_warning_says_so(tiny, key, value, words):
    expected = load_model(tiny).schedule
    write_scheduler(tiny, SD14_CONFIGS["scheduler"] | {key: value})
    with pytest.warns(UserWarning, match=re.escape(words)):
        schedule = load_model(tiny).schedule
    assert schedule.timesteps(50) == expected.timesteps(50)
    assert torch.equal(schedule.alphas_cumprod, expected.alphas_cumprod)


# As folders of latent consistency models have it.
LCM = {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}


@pytest.mark.parametrize("said", [LCM, {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}])
def test_a_folder_of_another_sampler_is_drawn_from(tiny, run, said):
    write_scheduler(tiny, SD14_CONFIGS["scheduler"] | said)
    with pytest.warns(UserWarning, match="another sampler's way; images are drawn with the --sampler's own"):
        code, printed = run(*reference.generate(tiny, Path("x.png")))
    assert code == 0, printed
    assert Path("x.png").exists()


def test_a_small_unet_of_an_old_diffusers_draws_at_64(tiny):
    change(tiny, "unet", _diffusers_version="0.9.0")
    assert load_model(tiny).unet.config["sample_size"] == 4
    change(tiny, "unet", _diffusers_version="0.8.1")
    with pytest.warns(UserWarning, match="sample_size is 4, of a diffusers before 0.9: images are drawn at 64 x 64"):
        assert load_model(tiny).unet.config["sample_size"] == 64


def test_a_schedule_is_not_guessed(tiny):
    write_scheduler(tiny, {key: value for key, value in PNDM.items() if key != "beta_end"})
    with pytest.raises(UserError, match=r"beta_start and beta_end are 0\.00085 and None"):
        _ = load_model(tiny).schedule
    for name, ends_clean in (("DDIMScheduler", True), ("LCMScheduler", True), ("PNDMScheduler", False)):
        write_scheduler(tiny, {**PNDM, "_class_name": name})  # what it leaves out is as in that class
        assert load_model(tiny).schedule.ends_clean == ends_clean


def test_a_model_saved_says_all_of_its_schedule(tiny, tmp_path):
    write_scheduler(tiny, PNDM)
    folder = weights.save_model(load_model(tiny), tmp_path / "saved")
    said = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    assert files.read_json(folder / weights.SCHEDULER).items() >= said.items()


def test_a_setting_that_says_nothing_is_none(tiny):
    config = files.read_json(tiny / "unet/config.json")
    files.write_text(tiny / "unet/config.json", json.dumps(config | {"upcast_attention": None}))
    assert load_model(tiny).unet
    files.write_text(tiny / "unet/config.json", json.dumps(config | {"upcast_attention": True}))
    with pytest.raises(UserError, match="upcast_attention is true, and only false"):
        load_model(tiny)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize(
    "name",
    [
        *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
        *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
        *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
    ],
)
def test_schedulers_that_diffusers_writes_open(tiny, name):
    """Made new for SD, and turned from the PNDM of SD 1.4, as most in circulation are: then they keep its settings."""
    make, pndm = reference.reference("diffusers", name, "PNDMScheduler")
    expected = load_model(tiny).schedule.alphas_cumprod
    told = {key: value for key, value in OVERRULED.items() if key in make().config}
    for scheduler in (make(**reference.BETAS, **told), make.from_config(pndm.from_config(SCHEDULERS["SD 1.4"]).config)):
        scheduler.save_pretrained(tiny / "scheduler")
        assert files.read_json(tiny / weights.SCHEDULER)["_class_name"] == name
        assert torch.equal(load_model(tiny).schedule.alphas_cumprod, expected)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # ours and theirs, of what they change
@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler", "LCMScheduler"])
@pytest.mark.parametrize("said", [{}, {"steps_offset": 0, "clip_sample": True}, {"set_alpha_to_one": False}])
def test_schedulers_become_what_diffusers_pipeline_makes_of_them(tiny, tmp_path, name, said):
    (pipeline,) = reference.reference("diffusers", "StableDiffusionPipeline")
    folder = weights.save_model(load_model(tiny), tmp_path / "ours")
    index = files.read_json(folder / "model_index.json")
    files.write_text(folder / "model_index.json", json.dumps(index | {"scheduler": ["diffusers", name]}))
    write_scheduler(folder, {**PNDM, "_class_name": name, **said})
    theirs = pipeline.from_pretrained(folder, local_files_only=True).scheduler.config
    ours = load_model(folder).schedule.config
    for key in ("clip_sample", "set_alpha_to_one", "steps_offset"):
        assert theirs.get(key, False) == ours[key]


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # ours and theirs, of what they change
@pytest.mark.parametrize("version", ["0.2.2", "0.7.0.dev0", "0.8.1", "0.9.0.dev0", "0.9.0", "0.10.2", "1.0.0"])
def test_unets_of_every_age_become_what_diffusers_pipeline_makes_of_them(tiny, tmp_path, version):
    (pipeline,) = reference.reference("diffusers", "StableDiffusionPipeline")
    folder = weights.save_model(load_model(tiny), tmp_path / "ours")
    change(folder, "unet", _diffusers_version=version)
    theirs = pipeline.from_pretrained(folder, local_files_only=True).unet.config
    assert load_model(folder).unet.config["sample_size"] == theirs.sample_size


@pytest.mark.oracle
def test_clips_that_transformers_writes_open(tiny):
    make, text = reference.reference("transformers", "CLIPConfig", "CLIPTextConfig")
    make(**files.read_json(tiny / "clip/config.json")).save_pretrained(tiny / "clip")
    text(**files.read_json(tiny / "text_encoder/config.json")).save_pretrained(tiny / "text_encoder")
    for part in ("clip", "text_encoder"):  # not what differs from the defaults: everything
        config = files.read_json(tiny / part / "config.json")
        whole = (make if part == "clip" else text)(**config).to_dict()
        files.write_text(tiny / part / "config.json", json.dumps(whole, default=str))
    assert load_model(tiny, parts=("text_encoder", "clip")).clip is not None
