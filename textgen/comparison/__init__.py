"""Which architecture is better? Arms, budgets, ensembles of runs, and a report that a statistician would sign.

arms        what a comparison compares                statistics  intervals, best of k, the verdict
budget      what is held equal                        analysis    where models differ
ensemble    several runs trained in one program       dynamic     models that go on learning
jobs        one program's runs, to the end            results     a finished comparison's folder, read
ledger      the folder, and what is done              document, figures, details, report   the pages
compare     all of it, from the config to the report
"""
