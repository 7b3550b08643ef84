import collections, tests.serving.test_openapi as t
from tests.serving.test_openapi import *
C=collections.Counter()
import time
@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_own_schema(case) -> None:
    t0=time.time(); r=case.call(); dt=time.time()-t0
    code=r.json()['error']['code'] if r.status_code>=400 else ''
    k=(case.operation.label, case.meta.phase.name.value, case.meta.generation.mode.value, r.status_code, code)
    C[k]+=1; C[('t',)+k[:3]]+=dt
    if case.meta.generation.mode.is_positive and r.status_code==400: print(code, r.json()['error']['message'][:150])
def test_z():
    for k,v in sorted(C.items(), key=str): print(k,round(v,2))
