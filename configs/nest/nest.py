"""NeST on PLOP: new rows are pre-tuned as transformations of the old ones, which are frozen from then on
(Xie et al., ECCV 2024; docs/new_rows.md says how it differs). Its epochs on ADE20K: classifier_init.epochs=15."""
_base_ = ['../plop/plop.py']
classifier_init = dict(_delete_=True, type='pretuned', epochs=5, lr=1e-3, align_norms=True)
# background and old
method_later_stages = dict(model=dict(split_classifier=True, frozen=('decode_head.conv_seg.[bo]*',)))
