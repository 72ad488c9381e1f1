"""Choose the parameters of a classifier by cross validation: the fits run on all workers."""

import joblib
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.svm import SVC

from ostap_parallel.joblib import register

if __name__ == "__main__":
    register()
    features, classes = load_iris(return_X_y=True)
    search = GridSearchCV(SVC(), {"C": [0.01, 1.0, 100.0]}, cv=5)
    with joblib.parallel_config(backend="ostap", servers="auto"):
        search.fit(features, classes)
        scores = cross_val_score(search.best_estimator_, features, classes, cv=10)
    print(f"best C {search.best_params_['C']}, score {scores.mean():.2f}")
