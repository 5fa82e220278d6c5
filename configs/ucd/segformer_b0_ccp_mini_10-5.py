_base_ = ['../_base_/segformer_b0_ccp_mini.py', './ucd.py']
protocol = '10-5'
