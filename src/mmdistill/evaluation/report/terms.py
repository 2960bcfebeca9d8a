"""The terms on the page of the report. The texts are those of docs/glossary.md."""

TERMS = {
    "episode": (
        "One few-shot task: N classes (N-way), K support clips per class (K-shot) and Q query clips per class. The "
        "classifier is fitted to the labeled support clips. It classifies the query clips."
    ),
    "clip": (
        "The model's input: `data_module.num_frames` frames of one rally. Two consecutive frames of a clip are "
        "`data_module.sampling_rate` frames apart in the rally."
    ),
    "window": (
        "A clip whose position does not depend on events. Windows start every `data_module.window_stride` frames. By "
        "default they do not overlap."
    ),
    "rally": (
        "One annotated video. Its name selects the files of every modality. A video file of your own is one rally."
    ),
    "event": "One labeled moment of a rally, given by its frame number. In tennis: a stroke.",
    "crop": (
        "The rectangle that is cut from the stored frame. All modalities of a clip have the same crop and the same "
        "horizontal flip. The evaluation uses the center crop without a flip."
    ),
    "token": (
        "A block of `data_module.tubelet` frames × `data_module.patch_size` × `data_module.patch_size` px, the unit "
        "of the network's input."
    ),
    "mask": "The tokens that are removed from a clip. A tube mask removes the same positions in all frames.",
    "masked view": (
        "A clip with a mask in the evaluation (`data_module.n_masks`, `data_module.eval_mask_ratio`). The class "
        "probabilities of several masked views are averaged."
    ),
    "input mode": (
        "The input of the network in the evaluation: the whole clip, masked views with the same masks for all clips "
        "(`shared`), or masked views with separate masks for each clip (`per_clip`)."
    ),
    "modality": "`rgb`, `flow` (optical flow) or `skeleton` (heat-maps: one Gaussian per keypoint).",
    "statistics": (
        "The mean and standard deviation of the input channels of a modality. For heat-maps also `sigma`, the "
        "standard deviation of the Gaussian."
    ),
    "teacher": "A pretrained encoder of one modality. It is frozen during the distillation.",
    "student": "The RGB encoder that the distillation trains. It starts from the RGB teacher.",
    "chance level": "The accuracy of random predictions: 100 % / N.",
    "classifier": (
        "The method that is fitted to the features of the support clips and classifies the query clips: logistic "
        "regression, nearest centroid or k-NN."
    ),
    "scored network": (
        "The network that the report evaluates (`eval_component`, by default the student). The tables compare it "
        "with the baseline networks."
    ),
    "baseline network": (
        "Another network that is evaluated on the same episodes (`baselines=[...]`), for example `random`, an "
        "untrained encoder."
    ),
    "paired difference": (
        "The accuracy of the scored network minus that of another network on the same episode, averaged over the "
        "episodes."
    ),
    "probe": "A classifier that is trained on all labels instead of on episodes (`probe=true`): linear or k-NN.",
}
