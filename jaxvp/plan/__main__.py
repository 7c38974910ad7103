from jaxvp.plan.plan import run

run()
