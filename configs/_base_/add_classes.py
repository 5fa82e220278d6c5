"""What `mmseg-sats add` starts from: classes for a trained model, evaluated on the same images before and after."""
_base_ = './own_data.py'
eval_images = 'all'
later_stages = dict(lr=2e-4)
